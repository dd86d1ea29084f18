"""Configuration files: what they come to, and the one line for each thing that is wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.config.broken import BROKEN, FILES, VM, WATCH

from refault.cli.main import main
from refault.config.files import ConfigError, Files, load, load_alone
from refault.config.options import DaemonTable, ListenerTable, VmTable, WatchTable, fields_of
from refault.daemon.known.patience import Patience
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address, with_access
from refault.daemon.options import Configuration, HostOptions, VmOptions
from refault.migration.endpoint import Inet
from refault.qmp.access import Rule


@pytest.fixture(autouse=True)
def _runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/no/refault")
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
    host = HostOptions(control=Address("/no/refault/refault.control", server=True))
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
    assert vm.state_dir == Path("/no/refault/a")  # RuntimeDirectory=refault/%i


def test_what_is_no_toml_file_and_what_an_editor_left_is_not_read(tmp_path: Path) -> None:
    main_file = written(tmp_path, "", a=VM)
    for name in ("a.toml~", ".a.toml", "README"):
        (tmp_path / "vms.d" / name).write_text("nonsense")
    assert [vm.name for vm in load(main_file).vms] == ["a"]


def test_a_directory_that_has_gone_is_no_wish_to_drop_its_vms(tmp_path: Path) -> None:
    files = Files(written(tmp_path, "", a=VM))
    directory, elsewhere = tmp_path / "vms.d", tmp_path / "vms.d.new"
    assert len(files.load().vms) == 1
    directory.rename(elsewhere)
    for _ in range(2):
        with pytest.raises(ConfigError) as wrong:
            files.load()
        assert wrong.value.lines == (f"{directory}: it has gone; make it again, empty if its VMs are to go",)
    elsewhere.rename(directory)
    assert len(files.load().vms) == 1
    (directory / "a.toml").unlink()
    assert files.load().vms == ()
    directory.rmdir()
    assert files.load().vms == ()


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
        state_dir=Path("/no/refault/vm 1"),
        patience=Patience(client_wait=30),
    )


@pytest.mark.parametrize(("text", "told"), BROKEN, ids=[told for _, told in BROKEN])
def test_what_is_wrong_is_one_line_and_status_2(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text)
    for arguments in (
        ["check", "--config", str(file)],
        ["check", str(file)],
        ["serve", "--config", str(file)],
    ):
        assert main(arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"{file}: ")
        assert output.err.endswith("\n")
        assert output.err[:-1].isprintable()
        assert told in output.err
        assert len(output.err) < 2000


@pytest.mark.parametrize("kind", FILES)
def test_files_that_cannot_be_read_are_one_line_too(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, told = FILES[kind]
    make(tmp_path)
    for command in ("check", "serve"):
        assert main([command, "--config", str(tmp_path / "refault.toml")]) == 2
        assert capsys.readouterr() == ("", f"{tmp_path}/{told}\n")


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


def test_check_reads_no_file_without_end() -> None:
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
