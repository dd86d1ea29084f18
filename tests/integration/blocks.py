"""The blocks of README.md and docs/, and what becomes of each in tests: commands are run as they stand there.

`BLOCKS` has those of a page in its order, each by how it begins, so that none can come or go unseen. Not in
it: blocks of nothing but `make`, for what these run takes long (that there are such targets
tests/unit/test_docs.py holds), and the blocks ```sh of `WHOLE`: for each of these pages there is a test
of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
WHOLE = ("docs/first-migration.md", "docs/upgrade.md")


@dataclass(frozen=True)
class Typed:
    """Commands, which are run. What runs until it is stopped does so until the next of these blocks."""

    begins: str
    swaps: Mapping[str, str] = field(default_factory=dict)
    """What stands for words that the reader fills in."""
    first: str = ""
    """Commands that make what the page takes for granted."""
    then: str = ""
    """Commands that look at what has come of it."""


@dataclass(frozen=True)
class Written:
    """What is written to the file `path`, and `then` used, or compared."""

    begins: str
    path: str
    then: str
    swaps: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """What is left out, and why."""

    begins: str
    why: str


Block = Typed | Written | Left

_MACHINE = "qemu-system-x86_64 -M none -nodefaults -display none"
_QEMU = {"qemu-system-x86_64 ...": _MACHINE}
_RUN = {"run ...": "run --qemu /run/qemu/vm1-qemu.qmp --listen /run/qemu/vm1.qmp"}
_MONITOR = "-qmp unix:/run/qemu/vm1-qemu.qmp,server=on,wait=off"
_SERVED = "say vm1.qmp query-status"
_TOML = "/run/typed/refault.toml"
_CHECK = f"refault check {_TOML}"
_UNITS = "/run/systemd/system"

BLOCKS: dict[str, list[Block]] = {
    "README.md": [
        Typed("-qmp unix:", {"-qmp": f"{_MACHINE} -qmp"}, then=_SERVED),
    ],
    "docs/running.md": [
        Typed("qemu-system-x86_64 ... -qmp", _QEMU, then=_SERVED),
        Typed("systemd-sysusers refault.conf"),
        Typed("cp /etc/refault/example.env", then=_SERVED),
        Written(
            "[Service]",
            f"{_UNITS}/refault@vm1.service.d/own.conf",
            """
            systemctl daemon-reload; systemctl restart refault@vm1
            until say vm1.qmp query-status; do sleep 0.2; done
            pid=$(systemctl show --value --property=MainPID refault@vm1)
            test "$(stat --format=%U "/proc/$pid")" = libvirt-qemu
            """,
        ),
        Typed(
            "refault status            # for people",
            {"FILE": "/run/qemu/stream"},
            first="""
            say vm1.qmp '{"execute": "migrate", "arguments": {"uri": "exec:cat>/run/qemu/stream"}}'
            until say vm1.qmp query-migrate | grep completed; do sleep 0.2; done
            gzip --keep /run/qemu/stream
            """,
        ),
        Typed(
            "journalctl VM=vm1",
            {"5b1f...": "$(journalctl --field=RECOVERY_ID | head --lines=1)"},
            then="""
            journalctl VM=vm1 | grep --quiet 'vm1: '
            recovery=$(journalctl --field=RECOVERY_ID | head --lines=1)
            journalctl "RECOVERY_ID=$recovery" | grep --quiet 'recovered in'
            journalctl --dump-catalog d6bb3fecec3948ab896adab9e29b66ea | grep --quiet ^Subject
            """,
        ),
        Typed(
            "refault run ... --recover-uri",
            _RUN,
            first=f"systemctl disable --now refault@vm1; rm -r {_UNITS}/refault@vm1.service.d",
            then=_SERVED,
        ),
        Typed(
            "qemu-system-x86_64 ... -incoming",
            _RUN | {"qemu-system-x86_64 ...": f"{_MACHINE} {_MONITOR}"},
            then=_SERVED,
        ),
        Written(
            '    {"execute": "migrate"',
            "/run/typed/take-back",
            """
            said=$(say vm1.qmp "$(cat take-back)" || true)
            echo "$said" | grep refault:
            """,
        ),
    ],
    "docs/upgrade.md": [
        Typed("systemctl daemon-reload", then="systemctl is-active refault@vm1"),
        Written(
            "ARGS=",
            "/etc/refault/vm1.env",
            f"systemctl restart refault@vm1; {_SERVED}; systemctl stop refault@vm1",
        ),
    ],
    "docs/configuration.md": [
        Typed(
            "refault check ",
            first="""
            for vm in vm1 vm2; do
                printf '[vm.%s]\\nqemu = "/run/%s.real"\\nlisten = "/run/%s"\\n' $vm $vm $vm >$vm.toml
            done
            touch refault.toml
            """,
        ),
        Written("[daemon]", _TOML, f"refault check --config {_TOML}"),
        Written("[vm.web2]", _TOML, _CHECK),
    ],
    "docs/serve.md": [
        Typed("refault serve ", {"FILE": "/etc/refault/refault.toml"}, then="refault status"),
        Typed("$EDITOR", first="EDITOR=touch", then="systemctl is-active refault"),
        Written(
            "# /etc/systemd/system/refault.socket",
            f"{_UNITS}/refault.socket",
            """
            echo '[vm.vm1]' >/etc/refault/vms.d/vm1.toml
            echo 'qemu = "/run/qemu/vm1-qemu.qmp"' >>/etc/refault/vms.d/vm1.toml
            echo 'listen = "/run/qemu/vm1"' >>/etc/refault/vms.d/vm1.toml
            systemctl disable --now refault
            systemctl daemon-reload; systemctl start refault.socket
            test "$(stat --format='%a %G' /run/qemu/vm1)" = '660 kvm'
            say vm1 query-status
            systemctl stop refault.socket refault
            test ! -e /run/qemu/vm1
            """,
        ),
    ],
    "docs/access.md": [
        Typed("refault run --name vm1"),
        Written(
            '{"error"',
            "/run/typed/refused",
            "as zabbix say vm1.monitoring quit >said || true; diff refused said",
        ),
        Written(
            "vm1: client 3",
            "/run/typed/audited",
            """
            key='{"driver": "usb-kbd", "id": "k0", "bus": "usb.0"}'
            as ops say vm1.ops '{"execute": "device_add", "arguments": '"$key"'}' quit || true
            who='s/client [0-9]+ \\(uid [0-9]+, pid [0-9]+, [^)]+\\)/client/'
            sed -E "$who" audited >expected
            told() { journalctl --output=cat --unit='typed-*' | grep -F vm1.ops: | sed -E "$who"; }
            until told | grep refused; do sleep 0.2; done
            told | tail --lines=2 | diff expected -
            """,
        ),
        Typed(
            "refault run ... --control",
            _RUN,
            then="test \"$(stat --format='%a %G' /run/refault/vm1.control)\" = '660 ops'",
        ),
    ],
    "docs/restart.md": [
        Left('{"error"', "the answer to a command whose descriptor a kill has lost"),
        Typed(
            "refault release vm1 ",
            first="""
            qemu-system-x86_64 -M none -nodefaults -display none -qmp unix:/run/qemu/other,server=on,wait=off
            install -d --mode=700 /var/tmp/elsewhere
            refault run --name vm1 --qemu /run/qemu/vm1-qemu.qmp --listen /run/qemu/vm1.qmp
            refault run --name vm1 --qemu /run/qemu/other --listen /run/qemu/others \\
                --control /run/typed/other.control --state-dir /var/tmp/elsewhere
            for control in /run/refault/vm1.control other.control; do
                until refault status --json --control $control | grep '"kept": *true'; do sleep 0.2; done
            done
            systemctl kill --signal=KILL 'typed-*'
            """,
            then="say vm1-qemu.qmp query-status; say other query-status; rm /run/refault/vm1.control",
        ),
    ],
    "docs/session.md": [
        Typed("refault run --session auto", {"auto ...": f"auto {_RUN['run ...'][4:]}"}, then=_SERVED),
        Typed(
            "# where connections come",
            {"host-b.example": "127.0.0.1"},
            then="""
            systemd-run --quiet --collect --unit=typed-target socat UNIX-LISTEN:/run/target.sock,fork EXEC:cat
            until [ "$(echo here | socat -t 5 - TCP:127.0.0.1:4444)" = here ]; do sleep 0.2; done
            """,
        ),
        Typed("head -c 32 /dev/urandom"),
        Written(
            "[Service]",
            f"{_UNITS}/typed-tunnel.service",
            "systemctl daemon-reload; systemctl start typed-tunnel",
            {"/usr/local/bin": "/usr/bin"},
        ),
        Left('HMAC-SHA256(key, "refault session 1, who dials"', "a formula"),
        Left('HMAC-SHA256(key, "refault session 1, who answers"', "a formula"),
    ],
    "docs/libvirt.md": [
        Left("refault-qemu-system-x86_64: QEMU starts without refault", "what the wrapper says"),
        Written("[daemon]", _TOML, f"refault check --config {_TOML}"),
        Left("systemctl reload refault", "hosts with libvirt: tests/integration/test_libvirt.py has them"),
        Left("<domain type='kvm'", "is libvirt's to read"),
        Written("[vm.vm1]", _TOML, _CHECK),
    ],
    "docs/status.md": [
        Left("$ refault status --json | jq", "jq is not there; test_snapshot.py compares the fields"),
    ],
    "docs/architecture.md": [Left("clients ══QMP══▶", "a picture")],
}

PRELUDE = """
cd /run/typed
served=0
serves() { systemd-run --quiet --collect --unit="typed-$$-$((served += 1))" --property=Type=notify "$@"; }
refault() {
    case $1 in
    serve)
        systemctl stop 'typed-*'
        serves refault "$@"
        ;;
    run | tunnel) serves refault "$@" ;;
    status) until command refault "$@"; do sleep 0.2; done ;;
    events) command refault "$@" --no-follow ;;
    watch) while printf q && sleep 0.2; do :; done | script -qec 'refault watch' /dev/null ;;
    *) command refault "$@" ;;
    esac
}
qemu-system-x86_64() {
    local monitor="$*"
    monitor=${monitor##*-qmp unix:}
    monitor=${monitor%%,*}
    local unit=qemu-${monitor##*/}
    if systemctl is-active --quiet "$unit"; then systemctl stop "$unit"; rm -f "$monitor"; fi
    systemd-run --quiet --collect --unit="$unit" --uid=libvirt-qemu --gid=kvm qemu-system-x86_64 "$@"
    until [ -S "$monitor" ]; do sleep 0.1; done
}
as() {
    local user=$1
    shift
    setpriv --reuid="$user" --regid="$user" --clear-groups "$@"
}
"""
"""What a shell does in which blocks are run: what runs until it is stopped is a unit, and so is QEMU; whoever
types `refault status` types it again where QEMU is not connected to yet."""

SETUP = """
for user in ops admin zabbix prometheus; do useradd --system --user-group $user; done
groupadd --system kvm
useradd --system --gid=kvm libvirt-qemu
install -d --owner=libvirt-qemu /run/qemu
mkdir /run/typed
"""

SAY = """#!/usr/bin/python3
import json, socket, sys
with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as file:
    sock.settimeout(60)
    sock.connect("/run/qemu/" + sys.argv[1])
    file.readline()
    for said in ("qmp_capabilities", *sys.argv[2:]):
        sock.sendall((said if said[0] == "{" else json.dumps({"execute": said})).encode())
        reply = next(line.decode() for line in file if b'"event"' not in line)
        if said != "qmp_capabilities":
            print(reply.strip())
sys.exit("error" in json.loads(reply))
"""
"""A client of the socket in /run/qemu that its first argument names: says the others, shows the replies."""


_BLOCK = re.compile(
    r"^```(\w*)\n(.*?)^```$|((?<=\n\n)(?:    [^\n]*\n|\n(?=    ))+)", re.MULTILINE | re.DOTALL
)


def left_over(page: str) -> Iterator[str]:
    """The blocks of a page that `BLOCKS` has to have."""
    for kind, block in blocks((ROOT / page).read_text()):
        typed_whole = kind == "sh" and page in WHOLE
        if not typed_whole and not re.fullmatch(r"(make .*\n)+", block):
            yield block


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The blocks of a page, and of what kind each is: what stands behind ```; empty where it is indented."""
    for kind, fenced, indented in _BLOCK.findall(text):
        yield kind, fenced or re.sub(r"^    ", "", indented, flags=re.MULTILINE)


def script(block: Block, text: str) -> str:
    """What is run for a block whose text is this."""
    if isinstance(block, Left):
        return ""
    for words, instead in block.swaps.items():
        assert words in text, words
        text = text.replace(words, instead)
    if isinstance(block, Typed):
        return "\n".join(["systemctl stop 'typed-*'", block.first, text, block.then])
    directory, end = Path(block.path).parent, "END OF BLOCK"
    return f"mkdir -p {directory}\ncat >{block.path} <<'{end}'\n{text}{end}\n{block.then}"
