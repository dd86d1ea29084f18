# Everything a contributor runs. Each target alone installs what it needs: Debian packages (tests/tools/bootstrap) and,
# in .venv, Python ones. PYTHON picks the interpreter of .venv; 3.11 or later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BOOTSTRAP := PYTHON=$(PYTHON) tests/tools/bootstrap

# make demo DEMO="--losses 6 --memory 1G"; make campaign CAMPAIGN="--qemu qemu-10 --seed 1"; make test TEST="tests/unit -k splitter"
DEMO ?=
BENCH ?=
CAMPAIGN ?=
MATRIX ?=
QTESTS ?=
NIGHTLY ?=
ENDS ?=
LIBVIRT ?=
SUITE ?=
SYSTEMD ?=
TEST ?=
SECONDS ?= 60
# Other QEMUs than the machine's own, as make qemus unpacks them: .qemus/qemu-10 and so on.
QEMUS ?= 5.2 10 11
QEMU_DIR := $(CURDIR)/.qemus
NSPAWN_DIR := $(CURDIR)/.nspawn
SUITES_DIR := $(CURDIR)/.suites
export PATH := $(PATH):$(QEMU_DIR)

# What make install and make deb install: this checkout, or the wheel that make dist has built from it (PACKAGE=dist/NAME.whl).
PACKAGE ?= .
PREFIX ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
TMPFILESDIR ?= $(PREFIX)/lib/tmpfiles.d
CATALOGDIR ?= $(PREFIX)/lib/systemd/catalog
LIBDIR := $(PREFIX)/lib/refault
# One program under the names of the QEMUs that it can become; without libraries, for it starts every domain.
WRAPPED := qemu-kvm $(addprefix qemu-system-,aarch64 arm i386 loongarch64 ppc64 riscv64 s390x)
# What is installed is for all to read, whatever the umask of who installs it.
READABLE := umask 022 &&
# Where systemctl reload is to wait until it is done: systemd knows Type=notify-reload from 253 on.
NOTIFY_RELOAD ?= $(shell systemctl --version 2>/dev/null | awk 'NR == 1 && $$2 >= 253 { print "yes" }')
NOTIFY_RELOAD_UNIT := $(if $(NOTIFY_RELOAD),-e 's/^Type=notify$$/Type=notify-reload/' -e '/^ExecReload=/d')

CEXT := $(wildcard cext/*.c cext/*.h)
WRAPPER := $(wildcard wrapper/*.c)
C_FILES := $(wildcard cext/*.c wrapper/*.c tests/fuzz/*.c tests/tsan/*.c tests/unit/channel/*.c)
C_AND_HEADERS := $(CEXT) $(wildcard wrapper/*.c wrapper/*.h tests/fuzz/*.c tests/fuzz/*.h tests/tsan/*.c tests/unit/channel/*.c)
C_WARNINGS := -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -Icext -fsyntax-only

# Each has a module of its own in tests/campaign.
CAMPAIGNS := starvation truth floor strays silence patience huge_pages many last_bytes tunnel session troubles \
        restart session_restart

.PHONY: libvirt-lab help build demo picture qemus analyzers prometheus analyze matrix qtests test systemd campaign campaign-kill \
        campaign-preempt $(CAMPAIGNS:%=campaign-%) lint bench fuzz tsan ends nightly dist install deb clean
.NOTPARALLEL:

help:
	@echo 'make demo     a real migration between two QEMUs, broken and recovered (DEMO="--losses 6")'
	@echo 'make picture  docs/demo.svg and docs/watch.svg anew, from a run of the demo'
	@echo 'make qemus    QEMU 5.2, 10.0 and 11.1 of other Debian suites, in .qemus/ (QEMUS="10"); the tests use them if there'
	@echo 'make analyzers  QEMU'"'"'s own analyze-migration.py of 7.2 and 10.0, in .qemus/; the tests need them'
	@echo 'make prometheus  Debian'"'"'s Prometheus, unpacked in .qemus/; the tests of monitoring/ need it'
	@echo 'make analyze  the forward decoder beside them, on streams that QEMUs save'
	@echo 'make test     unit and integration tests (TEST=tests/unit for some of them)'
	@echo 'make systemd  of these, the units under a real systemd, in a container (SUITE=trixie SYSTEMD="-m nightly -k notices")'
	@echo 'make campaign  20 losses of each class, over the whole life of a migration (CAMPAIGN="--help")'
	@echo 'make campaign-kill  of these, kill -9 of either refault alone (CAMPAIGN="--qemu qemu-10 --each 17")'
	@echo 'make lint     ruff, mypy, clang-format, gcc and clang'
	@echo 'make bench    benchmarks'
	@echo 'make fuzz     fuzz targets under sanitizers (SECONDS=600 each)'
	@echo 'make ends     random ends of legs and lanes, beside plain sockets (ENDS="--steps 1000000 --seed 1")'
	@echo 'make tsan     the pump and its readers under the thread sanitizer and others (SECONDS=60 each)'
	@echo 'make campaign-preempt  make campaign with postcopy-preempt on'
	@echo 'make campaign-starvation  lost requests: how soon their vCPUs run again, and that they do not without replay'
	@echo 'make campaign-truth  the record against QEMU'"'"'s own trace events (CAMPAIGN="--qemu PATH --migrations 50")'
	@echo 'make campaign-restart  refault killed at random moments under clients, who notice nothing (CAMPAIGN="--kills 500")'
	@echo 'make campaign-floor  time from a loss until both sides are active, beside the least that QEMU takes'
	@echo 'make campaign-strays  strangers at the migration address in every phase, beside a bare QEMU'
	@echo 'make campaign-huge_pages  huge pages, lost while the source serves a request, which QEMU alone does not survive'
	@echo 'make campaign-many  what 100 VMs cost: one daemon in front of all, and one each'
	@echo 'make campaign-troubles  what one VM whose QEMU or client misbehaves costs the others behind the same daemon'
	@echo 'make campaign-tunnel  10 GiB through refault tunnel, 500 connections lost (CAMPAIGN="--size 2")'
	@echo 'make campaign-session  1000 connections of migrations lost, with sessions; beside it without (CAMPAIGN="--losses 100")'
	@echo 'make campaign-session_restart  sessions whose refaults are restarted again and again, which no QEMU notices'
	@echo 'make campaign-silence  a network that goes silent, beside a bare QEMU'
	@echo 'make campaign-last_bytes  what the kernels hold when an end comes, 20 times each (CAMPAIGN="--qemu qemu-10")'
	@echo 'make matrix   all checks on QEMU 5.2, 7.2, 10.0 and 11.1, as a table (MATRIX="--only truth")'
	@echo 'make qtests   QEMU'"'"'s own migration-test of 7.2 and 10.0, through refault and without (QTESTS="--only postcopy")'
	@echo 'make campaign-patience  slow migrations, a blocked main thread, a source that nobody answers'
	@echo 'make libvirt-lab  two libvirt hosts on this machine, with QEMU alone and with refault (LIBVIRT="--lifecycle" SUITE=trixie)'
	@echo 'make nightly  all that is too long for CI, for hours; goes on where it was (NIGHTLY="fuzz qtests" for some steps)'
	@echo 'make dist     sdist and wheel, in dist/'
	@echo 'make install  program, man pages, completion, systemd units and directories (DESTDIR, PREFIX, PACKAGE)'
	@echo 'make deb      a Debian package of all that, for this release of Debian, in dist/'
	@echo 'make clean    removes what was built, .venv included'

# The package in .venv, in place: Python from src/, the compiled part beside it.
build: $(VENV)/.compiled

$(VENV)/.installed: pyproject.toml tests/tools/bootstrap
	$(BOOTSTRAP) build
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet cffi setuptools --editable .
	touch $@ $(VENV)/.compiled

$(VENV)/.compiled: $(VENV)/.installed $(CEXT) cext/ffi.py
	$(BIN)/python cext/ffi.py
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

demo: build
	$(BOOTSTRAP) demo
	tests/tools/with-userfaultfd $(BIN)/refault demo $(DEMO)

# The README's pictures, anew.
picture: build
	$(BOOTSTRAP) demo
	tests/tools/with-userfaultfd $(BIN)/python docs/picture.py docs/demo.svg docs/watch.svg

qemus:
	tests/tools/qemus $(QEMU_DIR) $(QEMUS)

analyzers:
	$(BOOTSTRAP) test
	tests/tools/analyzers $(QEMU_DIR) 7.2 10

prometheus:
	tests/tools/prometheus $(QEMU_DIR)

analyze: analyzers build $(VENV)/.dev
	tests/tools/with-userfaultfd $(BIN)/python -m pytest tests/integration/test_analyze.py

test: build $(VENV)/.dev
	$(BOOTSTRAP) test libvirt
ifeq ($(TEST),)
	tests/tools/with-userfaultfd $(BIN)/python -m pytest -n auto tests/unit
	tests/tools/with-userfaultfd $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist loadgroup tests/integration
else
	tests/tools/with-userfaultfd $(BIN)/python -m pytest $(TEST)
endif

# In a Debian of their own, kept in .nspawn, which make test has as well, or in one of another suite (SUITE=trixie).
systemd: build $(VENV)/.dev
	$(BOOTSTRAP) test
	tests/tools/nspawn $(NSPAWN_DIR) $(SUITE)
	REFAULT_SUITE=$(SUITE) $(BIN)/python -m pytest tests/integration/test_systemd.py $(SYSTEMD)

campaign: build $(VENV)/.dev
	$(BOOTSTRAP) test
	tests/tools/with-userfaultfd $(BIN)/python -m tests.campaign $(CAMPAIGN)

campaign-preempt: build $(VENV)/.dev
	$(BOOTSTRAP) test
	tests/tools/with-userfaultfd $(BIN)/python -m tests.campaign --preempt $(CAMPAIGN)

lint: build $(VENV)/.dev
	$(BOOTSTRAP) $(if $(CI),lint,build)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_AND_HEADERS)
	gcc $(C_WARNINGS) $(C_FILES)
	@if command -v clang >/dev/null; then echo clang $(C_WARNINGS) $(C_FILES); clang $(C_WARNINGS) $(C_FILES); \
	 else echo 'clang is not installed: gcc alone has checked'; fi

bench: build $(VENV)/.dev
	$(BOOTSTRAP) test
	set -e; for bench in tests/bench/bench_*.py; do echo "== $$bench"; tests/tools/with-userfaultfd $(BIN)/python -m tests.bench.$$(basename "$$bench" .py) $(BENCH); done

fuzz: build
	$(BOOTSTRAP) fuzz
	tests/fuzz/run.sh $(SECONDS)

ends: build $(VENV)/.dev
	$(BIN)/python -m tests.model.ends $(ENDS)

tsan:
	$(BOOTSTRAP) fuzz
	tests/tsan/run.sh $(SECONDS)

# kill -9 of either refault in every phase, and of both in postcopy; one that hangs and is killed by its watchdog, too.
KILLED := refault_source refault_destination refault_both refault_again killed_setup killed_precopy killed_switchover \
          killed_paused killed_recovery killed_last
HUNG := hung_precopy hung_switchover refault_hung hung_paused hung_recovery hung_last
campaign-kill: build $(VENV)/.dev
	$(BOOTSTRAP) test
	tests/tools/with-userfaultfd $(BIN)/python -m tests.campaign $(patsubst %,--only %,$(KILLED) $(HUNG)) $(CAMPAIGN)

$(CAMPAIGNS:%=campaign-%): build $(VENV)/.dev
	$(BOOTSTRAP) test
	tests/tools/with-userfaultfd $(BIN)/python -m tests.campaign.$(@:campaign-%=%) $(CAMPAIGN)

# The machine's own QEMU, 7.2 on Debian 12, and those of make qemus.
matrix: build $(VENV)/.dev qemus
	$(BOOTSTRAP) test
	tests/tools/with-userfaultfd $(BIN)/python -m tests.campaign.matrix --qemu qemu-5.2 --qemu qemu-system-x86_64 \
	  --qemu qemu-10 --qemu qemu-11 $(MATRIX)

# Builds two QEMUs the first time.
qtests: build $(VENV)/.dev
	$(BOOTSTRAP) test qtests
	tests/tools/qtests $(QEMU_DIR) 7.2 10
	tests/tools/with-userfaultfd $(BIN)/python -m tests.qtests $(QTESTS)

# The machine's own libvirt and QEMU, or those of another suite, in .suites (SUITE=trixie, SUITE=trixie-backports).
libvirt-lab: build $(VENV)/.dev
	$(BOOTSTRAP) test libvirt
	$(if $(SUITE),tests/tools/suite $(SUITES_DIR) $(SUITE))
	$(BIN)/python -m tests.libvirt $(if $(SUITE),--root $(SUITES_DIR)/$(SUITE)) $(LIBVIRT)

nightly: build $(VENV)/.dev qemus analyzers prometheus
	$(BOOTSTRAP) libvirt
	tests/tools/nightly .nightly $(NIGHTLY)

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# A virtual environment of its own, so that nothing of the system's Python is touched; its scripts name PREFIX, not DESTDIR.
install:
	$(BOOTSTRAP) build
	$(READABLE) install -d $(DESTDIR)$(LIBDIR) $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(SYSCONFDIR)/refault/vms.d
	$(READABLE) $(PYTHON) -m venv $(DESTDIR)$(LIBDIR)
	$(READABLE) $(DESTDIR)$(LIBDIR)/bin/python -m pip install --quiet --upgrade --force-reinstall $(PACKAGE)
	$(READABLE) printf '#!%s/bin/python\nfrom refault.cli.main import main\n\nraise SystemExit(main())\n' $(LIBDIR) >$(DESTDIR)$(LIBDIR)/bin/refault
	ln -sfn $(LIBDIR)/bin/refault $(DESTDIR)$(PREFIX)/bin/refault
	$(READABLE) $(CC) -std=c11 -D_GNU_SOURCE -Wall -Wextra -O2 -static -s -o $(DESTDIR)$(PREFIX)/bin/refault-qemu-system-x86_64 $(WRAPPER)
	for name in $(WRAPPED); do ln -sfn refault-qemu-system-x86_64 $(DESTDIR)$(PREFIX)/bin/refault-$$name; done
	$(READABLE) $(DESTDIR)$(LIBDIR)/bin/python -m refault.cli.pages $(DESTDIR)$(PREFIX)/share
	$(READABLE) install -d $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSUSERSDIR) $(DESTDIR)$(TMPFILESDIR)
	$(READABLE) sed 's|@PREFIX@|$(PREFIX)|g' systemd/refault@.service >$(DESTDIR)$(UNITDIR)/refault@.service
	$(READABLE) sed -e 's|@PREFIX@|$(PREFIX)|g' $(NOTIFY_RELOAD_UNIT) systemd/refault.service >$(DESTDIR)$(UNITDIR)/refault.service
	$(READABLE) install -d $(DESTDIR)$(CATALOGDIR)
	$(READABLE) install -d $(DESTDIR)$(SYSCONFDIR)/apparmor.d/abstractions/libvirt-qemu.d $(DESTDIR)$(PREFIX)/share/refault/selinux
	install -m 644 packaging/apparmor/refault $(DESTDIR)$(SYSCONFDIR)/apparmor.d/abstractions/libvirt-qemu.d/refault
	install -m 644 packaging/selinux/refault.te packaging/selinux/refault.fc $(DESTDIR)$(PREFIX)/share/refault/selinux
	install -m 644 systemd/refault.catalog $(DESTDIR)$(CATALOGDIR)/refault.catalog
	install -m 644 systemd/refault.sysusers $(DESTDIR)$(SYSUSERSDIR)/refault.conf
	install -m 644 systemd/refault.tmpfiles $(DESTDIR)$(TMPFILESDIR)/refault.conf
	test -e $(DESTDIR)$(SYSCONFDIR)/refault/example.env || install -m 640 systemd/example.env $(DESTDIR)$(SYSCONFDIR)/refault/example.env
	test -e $(DESTDIR)$(SYSCONFDIR)/refault/refault.toml || install -m 644 systemd/refault.toml $(DESTDIR)$(SYSCONFDIR)/refault/refault.toml

# With Debian's own Python, on which the package depends.
deb:
	$(BOOTSTRAP) deb
	packaging/deb/build dist

clean:
	rm -rf $(VENV) $(QEMU_DIR) $(NSPAWN_DIR) $(SUITES_DIR) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/refault.egg-info
	find src tests cext -name __pycache__ -type d -prune -exec rm -rf {} +
	find src -name '*.so' -delete
