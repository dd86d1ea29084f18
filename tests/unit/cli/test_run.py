"""The command line of `refault run`, up to the daemon."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from refault.cli.main import build_parser, main
from refault.cli.run import configuration
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import SUN_PATH
from refault.daemon.known.patience import Patience
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.options import Configuration, HostOptions, VmOptions
from refault.migration.endpoint import Inet

MINIMAL = ["run", "--qemu", "/run/qemu/vm1", "--listen", "/run/vm1.qmp"]


def parsed(arguments: list[str]) -> Configuration:
    return configuration(build_parser(arguments).parse_args(arguments))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/refault/vm1")
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


@pytest.mark.usefixtures("runtime")
def test_defaults() -> None:
    vm = VmOptions(
        name="vm1",
        qemu=parse_address("unix:/run/qemu/vm1"),
        listen=(parse_address("unix:/run/vm1.qmp", server=True),),
        relay="auto",
        recover_uris=(),
        incoming=None,
        state_dir=Path("/run/refault/vm1"),
    )
    host = HostOptions(metrics=None, control=Address("/run/refault/vm1/vm1.control", server=True))
    assert parsed(MINIMAL) == Configuration(host=host, log_level="info", vms=(vm,), watches=())


def test_everything_given() -> None:
    arguments = [*MINIMAL, "--listen", "tcp:0.0.0.0:4444", "--name", "web 7", "--relay", "off"]
    arguments += ["--recover-uri", "tcp:0.0.0.0:5001", "--recover-uri", "unix:/run/r"]
    arguments += ["--client-wait", "30", "--give-up-after", "86400"]
    arguments += ["--incoming", "tcp:0.0.0.0:5000,unix:/run/qemu/i"]
    arguments += ["--metrics", "[::1]:9099", "--control", "/c", "--state-dir", "/s"]
    vm = VmOptions(
        name="web 7",
        qemu=parse_address("/run/qemu/vm1"),
        listen=(parse_address("/run/vm1.qmp", server=True), parse_address("tcp:0.0.0.0:4444", server=True)),
        relay="off",
        recover_uris=("tcp:0.0.0.0:5001", "unix:/run/r"),
        incoming=(Inet("0.0.0.0", 5000), "/run/qemu/i"),
        state_dir=Path("/s"),
        patience=Patience(client_wait=30, give_up_after=86400),
    )
    metrics = Address(None, "::1", 9099, server=True)
    host = HostOptions(metrics=metrics, control=Address("/c", server=True))
    assert parsed(arguments) == Configuration(host=host, vms=(vm,))


def test_a_tilde_that_the_shell_has_left_is_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/admin")
    for option in ("--control=~/c", "--control=unix:~/c", "--control=unix:/home/admin/c"):
        assert parsed([*MINIMAL, option]).host.control == Address("/home/admin/c", server=True)
    [vm] = parsed([*MINIMAL, "--state-dir=~/s"]).vms
    assert vm.state_dir == Path("/home/admin/s")


def test_every_name_fits_the_directory_of_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    for length in range(1, 65):
        name = "n" * length
        monkeypatch.setenv("RUNTIME_DIRECTORY", f"/run/refault/{name}")
        control = parsed([*MINIMAL, "--name", name]).host.control
        assert len(control.path or "") < SUN_PATH
        assert Path(control.path or "").name == f"{name}.control" or length > 42


def test_state_directory_of_the_service_manager_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/dev/shm/a:/dev/shm/b")
    assert parsed(MINIMAL).vms[0].state_dir == Path("/dev/shm/a")


def test_a_tcp_monitor_gives_a_name_too() -> None:
    assert parsed(["run", "--qemu", "tcp:10.0.0.1:4444", "--listen", "/l"]).vms[0].name == "10.0.0.1:4444"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], "required: --qemu, --listen"),
        (["run", "--qemu", "/q"], "required: --listen"),
        (["run", "--qemu", "nonsense", "--listen", "/l"], "argument --qemu: address 'nonsense'"),
        ([*MINIMAL, "--listen", "/" + "x" * 108], "at most 107 bytes"),
        ([*MINIMAL, "--listen", "tcp:host:99999"], "port up to 65535"),
        ([*MINIMAL, "--listen", "tcp:h:1,allow-user=root"], "of who connects over TCP no user is known"),
        ([*MINIMAL, "--relay", "perhaps"], "invalid choice: 'perhaps'"),
        ([*MINIMAL, "--name", "a/b"], "is not a name"),
        ([*MINIMAL, "--name", ""], "is not a name"),
        ([*MINIMAL, "--name", "a\nb"], "is not a name"),
        ([*MINIMAL, "--name", "x" * 65], "at most 64 bytes"),
        ([*MINIMAL, "--recover-uri", "host"], "is not a migration URI"),
        ([*MINIMAL, "--recover-uri", "tcp:0:0"], "could not know it"),
        ([*MINIMAL, "--recover-uri", "tcp:198.51.100.2"], "is not like tcp:"),
        ([*MINIMAL, "--recover-uri", "tcp:::1:4444"], "is not like tcp:"),
        ([*MINIMAL, "--listen", "unix:/run/qemu/vm1"], "this address is that of --qemu"),
        ([*MINIMAL, "--listen", "unix:///run//qemu/vm1"], "this address is that of --qemu"),
        ([*MINIMAL, "--listen", "/run/vm1.qmp,server=off"], "this address was given before"),
        ([*MINIMAL, "--control", "/run/vm1.qmp"], "this address is that of --listen"),
        ([*MINIMAL, "--control", "/run/qemu/vm1"], "this address is that of --qemu"),
        ([*MINIMAL, "--listen", "tcp:h:1", "--metrics", "h:1"], "this address is that of --listen"),
        ([*MINIMAL, "--incoming", "tcp:0:1,unix:/run/vm1.qmp"], "this address is that of --listen"),
        (["run", "--qemu", "~/q", "--listen", "/l"], "'~' means nothing here"),
        (["run", "--qemu", "vm1.qmp", "--listen", "/l"], "is ./vm1.qmp"),
        (["run", "--qemu", "tcp://h:1", "--listen", "/l"], "it is no URL"),
        ([*MINIMAL, "--listen", "http://h/l"], "no other kinds of sockets"),
        ([*MINIMAL, "--listen", "/l,server=on,reconnect=1"], "'reconnect' is for who connects"),
        (["run", "--qemu", "/proc", "--listen", "/l"], "unix:/proc is a directory"),
        ([*MINIMAL, "--listen", "/proc"], "unix:/proc is a directory"),
        (["run", "--qemu", "/q,server=on,wait=on", "--listen", "/l"], "'wait=on' stands at a listener"),
        ([*MINIMAL, "--client-wait", "0"], "from 1 to 3600"),
        ([*MINIMAL, "--give-up-after", "never"], "from 1 to 604800"),
        ([*MINIMAL, "--incoming", "tcp:0:4444"], "is not like tcp:"),
        ([*MINIMAL, "--incoming", "unix:/a,unix:/b"], "is not like tcp:"),
        ([*MINIMAL, "--metrics", "9099"], "is not HOST:PORT"),
        ([*MINIMAL, "--metrics", "host:http"], "is not HOST:PORT"),
        ([*MINIMAL, "--metrics", "host:70000"], "is not HOST:PORT"),
        ([*MINIMAL, "--metrics", "http://host:9099"], "is not HOST:PORT"),
        ([*MINIMAL, "--metrics", "tcp:host:9099"], "is not HOST:PORT"),
        ([*MINIMAL, "--metrics", "::1:9099"], "is not HOST:PORT"),
        ([*MINIMAL, "--recover-uri", "tcp://host:4444"], "is a URL"),
        ([*MINIMAL, "--incoming", "tcp://host:4444,unix:/i"], "has a URL"),
        ([*MINIMAL, "--control", "/" + "x" * 108], "at most 107 bytes"),
        (["run", "--qemu", "/" + "x" * 80, "--listen", "/l"], "add --name"),
        ([*MINIMAL, "extra"], "unrecognized arguments: extra"),
        ([*MINIMAL, "--state", "/s"], "unrecognized arguments: --state /s"),
        ([*MINIMAL, "--name", "a", "--name", "b"], "--name: given more than once"),
        ([*MINIMAL, "--qemu", "/other"], "--qemu: given more than once"),
        ([*MINIMAL, "--control", ""], "'' is no path"),
        ([*MINIMAL, "--control", "/c,read-only=on"], "allow-user= and allow-group= alone"),
        ([*MINIMAL, "--control", "/c,server=off"], "allow-user= and allow-group= alone"),
        ([*MINIMAL, "--control", "c,abstract=on"], "allow-user= and allow-group= alone"),
        ([*MINIMAL, "--control", "/c,allow-user=no-such-user"], "this host has no such user"),
        ([*MINIMAL, "--metrics", "unix:/m,audit=on"], "allow-user= and allow-group= alone"),
        ([*MINIMAL, "--metrics", "unix:/run/vm1.qmp"], "this address is that of --listen"),
        ([*MINIMAL, "--control", "tcp:127.0.0.1:1"], "is an address, and a path is wanted"),
        ([*MINIMAL, "--state-dir", "unix:/s"], "is an address, and a path is wanted"),
        (["status", "--control", "tcp:127.0.0.1:1"], "is an address, and a path is wanted"),
        (["inspect", "tcp:127.0.0.1:1"], "is an address, and a path is wanted"),
        ([*MINIMAL, "--state-dir", ""], "'' is no path"),
        ([*MINIMAL, "--state-dir", "~nobody-of-this-name/s"], "~nobody-of-this-name"),
        ([*MINIMAL, "--metrics", "http://127.0.0.1:9099"], "is not HOST:PORT"),
        ([*MINIMAL, "--recover-uri", "tcp:b:1", "--recover-uri", "tcp:b:1"], "tcp:b:1: given more than once"),
        ([*MINIMAL, "--dead-after", "nan"], "from 1 to 3600"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert told in output.err


def test_the_daemon_carries_no_terminal_library() -> None:
    code = "import sys, refault.cli.main as m; m.build_parser(['run']); print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("option", "level"), [([], logging.INFO), (["--verbose"], logging.DEBUG)])
def test_what_the_daemon_ends_with_is_a_line_of_the_log(
    option: list[str],
    level: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def serve(*_: object) -> None:
        raise OperatorError("this; do that")

    levels: list[int] = []
    monkeypatch.setattr("refault.daemon.host.log.setup_logging", levels.append)
    monkeypatch.setattr("refault.daemon.app.serve", serve)
    monkeypatch.setattr("os.umask", lambda _: 0)
    assert main([*MINIMAL, *option]) == 1
    assert levels == [level]
    assert caplog.messages == ["refault: vm1: this; do that"]
