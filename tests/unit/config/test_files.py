"""Configuration files: what they come to, and the one line for each thing that is wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from refault.cli.main import main
from refault.config.files import MOST, ConfigError, load, load_alone
from refault.config.options import DaemonTable, ListenerTable, VmTable, WatchTable, fields_of
from refault.daemon.known.patience import Patience
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address, with_access
from refault.daemon.options import Configuration, HostOptions, VmOptions
from refault.migration.endpoint import Inet
from refault.qmp.access import Rule

B = '[vm.b]\nqemu = "/q/b"\nlisten = "/l/b"\n'
URI = 'recover_uri = "tcp:h:1"\n'
WATCH = '[[watch]]\nqemu = "/q/*"\nlisten = "/l/{stem}"\n'
VM = '[vm.a]\nqemu = "/q/a"\nlisten = "/l/a"\n'


@pytest.fixture(autouse=True)
def _runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/refault")
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


def written(directory: Path, text: str, **further: str) -> Path:
    """refault.toml with `text`, and in vms.d NAME.toml with each of `further`."""
    main_file = directory / "refault.toml"
    main_file.write_text(text)
    for name, content in further.items():
        (directory / "vms.d").mkdir(exist_ok=True)
        (directory / "vms.d" / f"{name}.toml").write_text(content)
    return main_file


def loaded(directory: Path, text: str, **further: str) -> Configuration:
    return load(written(directory, text, **further))


def test_an_empty_file_is_a_daemon_without_a_vm(tmp_path: Path) -> None:
    host = HostOptions(control=Address("/run/refault/refault.control", server=True))
    assert loaded(tmp_path, "") == Configuration(host=host, log_level="info", vms=(), watches=())


def test_everything_given(tmp_path: Path) -> None:
    text = """
        [daemon]
        metrics = "[::1]:9099"
        control = "/c"
        state_dir = "/s"
        log_level = "debug"
        [defaults]
        relay = "off"
        dead_after = 7
        [vm."web 7"]
        qemu = "tcp:10.0.0.1:1"
        listen = ["/l/7,mode=0660", "tcp:0.0.0.0:4444"]
        relay = "auto"
        recover_uri = ["tcp:0.0.0.0:5001", "unix:/r"]
        stall_after = 2.5
        client_wait = 30
        give_up_after = 86400
        incoming = "tcp:0.0.0.0:5000,unix:/i"
    """
    found = loaded(tmp_path, text, b='[vm.b]\nqemu = "/q/b"\nlisten = "/l/b"\nstate_dir = "/other"\n')
    assert found.host == HostOptions(
        metrics=Address(None, "::1", 9099, server=True), control=Address("/c", server=True)
    )
    assert found.log_level == "debug"
    assert found.vms == (
        VmOptions(
            name="web 7",
            qemu=parse_address("tcp:10.0.0.1:1"),
            listen=(
                parse_address("/l/7,mode=0660", server=True),
                parse_address("tcp:0.0.0.0:4444", server=True),
            ),
            relay="auto",
            recover_uris=("tcp:0.0.0.0:5001", "unix:/r"),
            incoming=(Inet("0.0.0.0", 5000), "/i"),
            state_dir=Path("/s/web 7"),
            patience=Patience(dead_after=7, stall_after=2.5, client_wait=30, give_up_after=86400),
        ),
        VmOptions(
            name="b",
            qemu=parse_address("/q/b"),
            listen=(parse_address("/l/b", server=True),),
            relay="off",
            state_dir=Path("/other"),
            patience=Patience(dead_after=7),
        ),
    )


def test_a_listener_may_be_a_table(tmp_path: Path) -> None:
    text = VM.replace(
        '"/l/a"',
        """[
            "/l/a,mode=0660",
            { address = "/l/b,server=on", allow_users = ["0", "42"], allow_groups = "0", hide_pause = 1.5 },
            { address = "/l,,c", mode = "0600", deny = ["quit", "stop"], audit = true, read_only = false },
        ]""",
    )
    [vm] = loaded(tmp_path, text).vms
    assert vm.listen == (
        parse_address("/l/a,mode=0660", server=True),
        with_access(
            parse_address("/l/b", server=True),
            allow_users=[0, 42],
            allow_groups=[0],
            hide_pause=1.5,
        ),
        with_access(parse_address("/l,,c,mode=0600", server=True), deny=["quit", "stop"], audit=True),
    )
    watch = WATCH.replace('"/l/{stem}"', '{ address = "/l/{stem}", allow_users = "root" }')
    [watched] = loaded(tmp_path, watch).watches
    assert watched.vm("/q/x").listen == (parse_address("/l/x,allow-user=root", server=True),)


def test_a_vm_has_the_directory_that_its_unit_gave_it(tmp_path: Path) -> None:
    [vm] = loaded(tmp_path, VM).vms
    assert vm.state_dir == Path("/run/refault/a")  # RuntimeDirectory=refault/%i


def test_what_is_no_toml_file_and_what_an_editor_left_is_not_read(tmp_path: Path) -> None:
    main_file = written(tmp_path, "", a=VM)
    for name in ("a.toml~", ".a.toml", "README"):
        (tmp_path / "vms.d" / name).write_text("nonsense")
    assert [vm.name for vm in load(main_file).vms] == ["a"]


def test_a_watch_makes_a_vm_of_a_path(tmp_path: Path) -> None:
    [watch] = loaded(
        tmp_path,
        """
        [defaults]
        client_wait = 30
        [[watch]]
        qemu = "/run/*/monitor,[0-9].sock"
        listen = ["{dir}/{stem}.qmp,mode=0660", "/run/by-name/{parent}-{file}"]
        name = "{parent}"
        relay = "off"
        """,
    ).watches
    assert watch.matches("/run/vm 1/monitor,0.sock")
    assert not watch.matches("/run/vm1/monitor,a.sock")
    assert not watch.matches("/run/vm1/x/monitor,0.sock")
    assert not watch.matches("/run/.vm1/monitor,0.sock")
    assert watch.vm("/run/vm 1/monitor,0.sock") == VmOptions(
        name="vm 1",
        qemu=parse_address("unix:/run/vm 1/monitor,,0.sock"),
        listen=(
            parse_address("/run/vm 1/monitor,,0.qmp,mode=0660", server=True),
            parse_address("/run/by-name/vm 1-monitor,,0.sock", server=True),
        ),
        relay="off",
        state_dir=Path("/run/refault/vm 1"),
        patience=Patience(client_wait=30),
    )


BROKEN: list[tuple[str, str]] = [
    ("[vm.a", "]' at the end of a table declaration"),
    ("x = ", "at its end: Invalid value"),
    (VM + "relay = auto", "line 4, column 9: Invalid value"),
    (VM + 'qemu = "/q"', "Cannot overwrite a value"),
    (VM + VM, "Cannot declare ('vm', 'a') twice"),
    (f"x = {'[' * 5000}", "within one another"),
    (f"x = {'9' * 5000}", "digits"),
    ('qemu = "/q/a"', "refault.toml: qemu: not known; at the top stand [daemon]"),
    ('"a\\nb" = 1', 'refault.toml: "a\\nb": not known'),
    ('[vms.a]\nqemu = "/q/a"', "refault.toml: vms: not known; at the top stand"),
    ('[vm]\nqemu = "/q/a"', "[vm] qemu: a VM is a table with its name, [vm.NAME]"),
    ("vm = 1", "a VM is a table with its name, [vm.NAME]"),
    (VM.replace("[vm.a]", "[[vm.a]]"), "[vm.a] is one table, in single brackets"),
    (VM.replace("[vm.a]", "[vm.a.b]"), 'in quotes, as [vm."a.b"]'),
    (VM.replace("[vm.a]", '[vm."a/b"]'), "[vm.\"a/b\"]: 'a/b' is not a name"),
    (VM.replace("[vm.a]", '[vm.""]'), '[vm.""]: \'\' is not a name'),
    (VM.replace("[vm.a]", f"[vm.{'x' * 65}]"), "at most 64 bytes"),
    ('[vm.a]\nlisten = "/l"', "[vm.a] qemu: must be there: QEMU's monitor"),
    ('[vm.a]\nqemu = "/q"', "[vm.a] listen: must be there: where QMP clients come"),
    (VM.replace('"/l/a"', "[]"), "[vm.a] listen: is empty: name at least one"),
    (VM.replace('"/l/a"', "[1]"), "[vm.a] listen: [1] is not an address in quotes, a table of it"),
    (VM.replace('"/l/a"', "{ read_only = true }"), "[vm.a] listen: address: must be there"),
    (VM.replace('"/l/a"', '{ address = "/l", allow = "a" }'), "listen: allow: not known, allow_"),
    (VM.replace('"/l/a"', '[{ address = "/l", allow_users = [] }]'), "allow_users: is empty: name at"),
    (VM.replace('"/l/a"', '{ address = "/l", read_only = "yes" }'), 'read_only: "yes" is not true or false'),
    (VM.replace('"/l/a"', '{ address = "/l", deny = "a b" }'), "listen: address '/l,deny=a b': 'a b' is no"),
    (VM.replace('"/l/a"', '{ address = "tcp:h:1", allow_users = "root" }'), "over TCP no user is known"),
    (VM.replace('"/q/a"', "7"), "[vm.a] qemu: 7 is not a text in quotes"),
    (VM.replace('"/q/a"', '"nonsense"'), "[vm.a] qemu: address 'nonsense': expected unix:/path"),
    (VM.replace('"/q/a"', '"/proc"'), "[vm.a] qemu: unix:/proc is a directory"),
    (VM.replace('"/q/a"', '"/q\\u0000"'), "[vm.a] qemu: has a zero byte"),
    (VM.replace('"/l/a"', '"tcp:h:99999"'), "[vm.a] listen: address 'tcp:h:99999': expected tcp:HOST:PORT"),
    (VM.replace('"/l/a"', f'"/{"x" * 108}"'), "at most 107 bytes"),
    (VM.replace('"/l/a"', '["/l", "/l"]'), "[vm.a] listen: unix:/l is listen of [vm.a] already"),
    (VM + "dead-after = 5", "[vm.a] dead-after: not known, dead_after may be meant; what may stand here: "),
    (VM + "metrics = 'h:1'", "[vm.a] metrics: not known; what may stand here: "),
    (VM + 'dead_after = "5"', '[vm.a] dead_after: "5" is not a number'),
    (VM + "dead_after = true", "[vm.a] dead_after: true is not a number"),
    (VM + "dead_after = 0", "[vm.a] dead_after: 0 is not a number of seconds from 1 to 3600"),
    (VM + "dead_after = 1.5", "[vm.a] dead_after: 1.5 is not a whole number of seconds"),
    (VM + "stall_after = nan", "[vm.a] stall_after: nan is not a number of seconds"),
    (VM + f"stall_after = {'9' * 400}", "is not a number of seconds"),
    (VM + "client_wait = 2026-01-01", "[vm.a] client_wait: 2026-01-01 is not a number"),
    (VM + 'relay = "on"', '[vm.a] relay: "on" is not "auto" or "off"'),
    (VM + 'recover_uri = "host"', "[vm.a] recover_uri: 'host' is not a migration URI"),
    (VM + 'recover_uri = ["tcp:b:1", "tcp:b:1"]', "[vm.a] recover_uri: tcp:b:1: given more than once"),
    (VM + 'incoming = "tcp:0:4444"', "[vm.a] incoming: 'tcp:0:4444' is not like tcp:"),
    (VM + 'incoming = "tcp:0:1,unix:/l/a"', "[vm.a] incoming: unix:/l/a is listen of [vm.a] already"),
    (VM + B.replace("/q/b", "/q/a"), "[vm.b] qemu: unix:/q/a is qemu of [vm.a] already"),
    (VM + B.replace("/l/b", "/l/a"), "[vm.b] listen: unix:/l/a is listen of [vm.a] already"),
    (f"{VM}{URI}{B}{URI}", "[vm.b] recover_uri: tcp:h:1 is recover_uri of [vm.a] already"),
    ('[daemon]\ncontrol = "/l/a"\n' + VM, "[vm.a] listen: unix:/l/a is control of [daemon] already"),
    ('[daemon]\nmetrics = "h:1"\n' + VM.replace("/l/a", "tcp:h:1"), "tcp:h:1 is metrics of [daemon] already"),
    ('[daemon]\nmetrics = "9099"', "[daemon] metrics: '9099' is not HOST:PORT"),
    ('[daemon]\nmetrics = 9099', "[daemon] metrics: 9099 is not a text in quotes"),
    ('[daemon]\nlog_level = "loud"', '[daemon] log_level: "loud" is not "debug" or "info" or "warning"'),
    ('[daemon]\ncontrol = "c"', "[daemon] control: 'c' is not a whole path: begin with /"),
    ('[daemon]\ncontrol = ""', "[daemon] control: '' is no path"),
    (f'[daemon]\ncontrol = "/{"x" * 108}"', "a unix socket's path has at most 107 bytes"),
    ('[daemon]\nstate_dir = "/etc/passwd"', "[daemon] state_dir: /etc/passwd is not a directory"),
    (VM + 'state_dir = "/etc/passwd"', "[vm.a] state_dir: /etc/passwd is not a directory"),
    ('[daemon]\ncontrol = "/s/a"\nstate_dir = "/s"\n' + VM, "control: /s/a is the state directory of [vm.a]"),
    (VM.replace("/l/a", "/run/refault/a"), "listen: unix:/run/refault/a is the state directory of [vm.a]"),
    ("daemon = 1", "[daemon] is a table, 1 is none"),
    ("[[daemon]]", "[daemon] is a table, [a table] is none"),
    ('[defaults]\nqemu = "/q"', "[defaults] qemu: not known; what may stand here: relay, session, "),
    ("[defaults]\ngive_up_after = 1e9", "[defaults] give_up_after: 1000000000.0 is not a number of seconds"),
    (WATCH.replace("[[watch]]", "[watch]"), "[watch]: there may be several, so each is [[watch]]"),
    ('[[watch]]\nqemu = "/q/*"', "[[watch]] listen: must be there"),
    (WATCH.replace("/q/*", "q/*"), "[[watch]] qemu: 'q/*' is not a pattern of paths"),
    (WATCH.replace("stem", "name"), "[[watch]] listen: {name} stands for nothing; there are {dir}"),
    (WATCH.replace("/l/{stem}", "{dir}/{stem}.qmp"), "listen: /q/x.qmp would itself be found by /q/*"),
    (WATCH.replace("/l/", "l-"), "[[watch]] listen: address 'l-x': expected unix:/path"),
    (WATCH + 'name = "{dir}"', "[[watch]] name: '/q' is not a name"),
    (2 * WATCH, "[[watch]] number 2 qemu: /q/* is that of"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "told"), BROKEN)
def test_what_is_wrong_is_one_line_and_status_2(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text)
    for arguments in (["--config", str(file)], [str(file)]):
        assert main(["check", *arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        assert output.err.startswith(f"{file}: ")
        assert told in output.err


FURTHER: list[tuple[str, str, str]] = [
    ("[daemon]\n", "[daemon] stands in", "alone; here stand [vm.NAME] and [[watch]]"),
    ("[defaults]\n", "[defaults] stands in", "alone; here stand [vm.NAME] and [[watch]]"),
    (VM, "[vm.a]: ", "refault.toml has a VM of this name already"),
    (VM.replace("vm.a", "vm.b"), "[vm.b] qemu: unix:/q/a is qemu of [vm.a] already", ""),
    ("nonsense", "at its end: ", ""),
]


@pytest.mark.parametrize(("text", "begins", "has"), FURTHER)
def test_what_is_wrong_in_a_further_file_names_it(text: str, begins: str, has: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        loaded(tmp_path, VM, further=text)
    assert wrong.value.lines[0].startswith(f"{tmp_path}/vms.d/further.toml: {begins}")
    assert has in wrong.value.lines[0]


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, directory, binary = tmp_path / "none.toml", tmp_path, tmp_path / "b.toml"
    binary.write_bytes(b'a = "b"\nb = "\xff"')
    for file, told in ((missing, "No such file"), (directory, "Is a directory"), (binary, "line 2: TOML is")):
        assert main(["check", "--config", str(file)]) == 2
        output = capsys.readouterr().err
        assert output.startswith(f"{file}: {told}")
        assert output.count("\n") == 1


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = VM.replace("/q/a", "q") + "[vm.b]\n" + "[vm.c]\nrelay = 1\n"
    assert main(["check", str(written(tmp_path, broken))]) == 2
    told = capsys.readouterr().err.splitlines()
    keys = ["[vm.a] qemu", "[vm.b] listen", "[vm.b] qemu", "[vm.c] listen", "[vm.c] qemu", "[vm.c] relay"]
    assert sorted(line.split(": ")[1] for line in told) == keys


def test_check_names_what_would_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = VM + '[[watch]]\nqemu = "/q/*.real"\nlisten = "/l/{stem}"\n'
    assert main(["check", "--config", str(written(tmp_path, text))]) == 0
    output = capsys.readouterr()
    assert output.out == "a: unix:/q/a on unix:/l/a\n{stem}: /q/*.real on /l/{stem}\n"
    assert output.err == ""


def test_check_takes_files_or_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(written(tmp_path, VM))
    with pytest.raises(SystemExit) as ended:
        main(["check", "--config", file, file])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_file_says_is_what_the_command_line_says(tmp_path: Path) -> None:
    from refault.cli.main import build_parser
    from refault.cli.run import configuration

    [vm] = loaded(tmp_path, VM + "dead_after = 9\n").vms
    arguments = ["run", "--qemu", "/q/a", "--listen", "/l/a", "--dead-after", "9"]
    [run] = configuration(build_parser(arguments).parse_args(arguments)).vms
    assert replace(vm, state_dir=run.state_dir) == run


def test_every_option_of_files_is_in_configuration_md() -> None:
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    options = {
        **fields_of(DaemonTable),
        **fields_of(VmTable),
        **fields_of(WatchTable),
        **fields_of(ListenerTable),
    }
    assert {name for name in options if f"| `{name}`" not in page} == set()


def test_what_libvirt_hands_over_has_the_defaults_and_sockets_of_its_own(tmp_path: Path) -> None:
    text = '[daemon]\nexec = "/x,allow-user=0"\nstate_dir = "/s"\n[defaults]\nclient_wait = 3\n'
    handed = loaded(tmp_path, text).handed
    assert handed is not None
    assert handed.address == parse_address("unix:/x,allow-user=0", server=True)
    monitor = Address("/var/lib/libvirt/m.sock", server=True, fd=7)
    assert handed.vm("vm1", monitor) == VmOptions(
        name="vm1",
        qemu=Address("/s/vm1/monitor"),
        listen=(replace(monitor, rule=Rule(hide_pause=30.0)), Address("/s/vm1/qmp", server=True)),
        state_dir=Path("/s/vm1"),
        patience=Patience(client_wait=3),
    )
    with pytest.raises(ValueError, match="too long"):
        loaded(tmp_path, text.replace("/s", "/" + "s" * 99)).handed.vm("vm1", monitor)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "names"),
    [("vm1", ["vm1", "uuid"]), ("", ["uuid"]), ("a/b", ["uuid"]), ("n" * 65, ["uuid"]), ("a\n", ["uuid"])],
)
def test_a_domain_whose_name_is_none_here_has_its_uuid(tmp_path: Path, name: str, names: list[str]) -> None:
    handed = loaded(tmp_path, '[daemon]\nexec = "/x"\n').handed
    assert handed is not None
    assert handed.names(name, "uuid") == names


def test_a_daemon_waits_for_no_pipe_and_reads_no_file_without_end(tmp_path: Path) -> None:
    """A pipe or a device among the files would stop its loop, at a reload all VMs'."""
    main_file = written(tmp_path, VM, b=B)
    os.mkfifo(tmp_path / "vms.d" / "pipe.toml")
    (tmp_path / "vms.d" / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "vms.d" / "large.toml").touch()
    os.truncate(tmp_path / "vms.d" / "large.toml", MOST + 1)
    with pytest.raises(ConfigError) as error:
        load(main_file)
    assert [line.rpartition("/")[2] for line in error.value.lines] == [
        "large.toml: more than 16 MiB",
        "pipe.toml: no regular file",
        "zero.toml: no regular file",
    ]
    with pytest.raises(ConfigError, match="/dev/zero: more than 16 MiB"):
        load_alone([Path("/dev/zero")])


def test_check_reads_what_a_shell_pipes_to_it() -> None:
    reads, writes = os.pipe()
    with open(writes, "wb") as pipe:
        pipe.write(VM.encode())
    try:
        assert [vm.name for vm in load_alone([Path(f"/dev/fd/{reads}")]).vms] == ["a"]
    finally:
        os.close(reads)
