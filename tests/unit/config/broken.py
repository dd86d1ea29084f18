"""Configurations that cannot be, and what is said of each: of text, and of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from refault.config.files import MOST

B = '[vm.b]\nqemu = "/q/b"\nlisten = "/l/b"\n'
URI = 'recover_uri = "tcp:h:1"\n'
WATCH = '[[watch]]\nqemu = "/q/*"\nlisten = "/l/{stem}"\n'
VM = '[vm.a]\nqemu = "/q/a"\nlisten = "/l/a"\n'

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
    (VM.replace('"/q/a"', '"/q\\u0000"'), "[vm.a] qemu: has a control character (\\x00)"),
    (VM.replace('"/q/a"', '"/q\\n"'), "[vm.a] qemu: has a control character (\\n)"),
    (VM.replace('"/l/a"', '["/l", "/l\\u001b[2J"]'), "[vm.a] listen: has a control character (\\x1b)"),
    (VM.replace('"/l/a"', '{ address = "/l", deny = "a\\u2028" }'), "deny: has a control character"),
    (VM.replace("[vm.a]", '[vm."a\\u009b2J"]'), "is not a name"),
    ('[daemon]\ncontrol = "/c\\nx"', "[daemon] control: has a control character (\\n)"),
    ('[daemon]\nmetrics = "h\\n:1"', "[daemon] metrics: has a control character (\\n)"),
    ('[daemon]\n"met\\nrics" = "h:1"', 'rics": not known, metrics may be meant'),
    (WATCH.replace("/q/", "/q\\n/"), "[[watch]] qemu: has a control character (\\n)"),
    (VM + 'recover_uri = "unix:/x\\n"', "[vm.a] recover_uri: has a control character (\\n)"),
    (VM + 'state_dir = "/s\\n"', "[vm.a] state_dir: has a control character (\\n)"),
    ("\ufeff" + VM, "line 1, column 1: Byte order mark"),
    (VM.replace('"/q/a"', f'"/{"x" * 4999}"'), "at most 107 bytes, this has 5000"),
    (VM.replace('"/q/a"', f"[{'[' * 100}{']' * 100}]"), "is not a text in quotes"),
    (f"[vm.a]\n{'x' * 5000} = 1", "not known; what may stand here: relay"),
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
    (VM.replace("/l/a", "/no/refault/a"), "listen: unix:/no/refault/a is the state directory of [vm.a]"),
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
    (WATCH.replace("/q/*", "/q/{stem}.real"), "[[watch]] qemu: {stem} stands for something in listen"),
    (VM + WATCH.replace("/l/", "/m/").replace("/q/*", "/l/?"), "would find unix:/l/a, which is listen of"),
    ('[daemon]\ncontrol = "/q/c"\n' + WATCH, "qemu: /q/* would find /q/c, which is control of [daemon]"),
    ('[daemon]\nmetrics = "unix:/q/m"\n' + WATCH, "would find unix:/q/m, which is metrics of [daemon]"),
    (WATCH.replace("/q/*", "/no/refault/*"), "would find /no/refault/refault.control, which is control of"),
    (2 * WATCH, "[[watch]] number 2 qemu: /q/* is that of"),
]  # fmt: skip
"""Each is wrong in one thing, of which one line is said that has the second text."""


def _large(directory: Path) -> None:
    (directory / "refault.toml").touch()
    os.truncate(directory / "refault.toml", MOST + 1)


def _main(content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / "refault.toml").write_bytes(content)


def _link(name: str, to: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        if name != "refault.toml":
            (directory / "refault.toml").touch()
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).symlink_to(to)

    return make


def _in_vms_d(make: Callable[[Path], object], name: str = "a.toml") -> Callable[[Path], None]:
    def both(directory: Path) -> None:
        (directory / "refault.toml").touch()
        (directory / "vms.d").mkdir()
        make(directory / "vms.d" / name)

    return both


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _: None, "refault.toml: No such file or directory"),
    "a directory": (lambda path: (path / "refault.toml").mkdir(), "refault.toml: Is a directory"),
    "a pipe": (lambda path: os.mkfifo(path / "refault.toml"), "refault.toml: no regular file"),
    "a device without end": (_link("refault.toml", "/dev/zero"), "refault.toml: no regular file"),
    "a link to nowhere": (_link("refault.toml", "none"), "refault.toml: No such file or directory"),
    "a link to itself": (
        _link("refault.toml", "refault.toml"),
        "refault.toml: Too many levels of symbolic links",
    ),
    "too large": (_large, "refault.toml: more than 16 MiB"),
    "Latin-1": (
        _main(b'a = "b"\nb = "\xff"'),
        "refault.toml: line 2: TOML is written in UTF-8, and this is not",
    ),
    "UTF-16": (
        _main("[daemon]".encode("utf-16")),
        "refault.toml: line 1: TOML is written in UTF-8, and this is not",
    ),
    "zero bytes": (_main(bytes(3)), "refault.toml: line 1, column 1: Invalid statement"),
    "vms.d is a file": (_link("vms.d", "refault.toml"), "vms.d: Not a directory"),
    "vms.d is a link to itself": (_link("vms.d", "vms.d"), "vms.d: Too many levels of symbolic links"),
    "vms.d is a link to nowhere": (
        _link("vms.d", "x"),
        "vms.d: No such file or directory: it is a link to nowhere",
    ),
    "a directory in vms.d": (_in_vms_d(Path.mkdir), "vms.d/a.toml: Is a directory"),
    "a pipe in vms.d": (_in_vms_d(os.mkfifo), "vms.d/a.toml: no regular file"),
    "a link to nowhere in vms.d": (_link("vms.d/a.toml", "x"), "vms.d/a.toml: No such file or directory"),
    "a name of two lines": (_in_vms_d(Path.mkdir, "a\nb.toml"), "vms.d/a\\nb.toml: Is a directory"),
    "a name that is no text": (_in_vms_d(Path.mkdir, "\udcff.toml"), "vms.d/\\udcff.toml: Is a directory"),
}
"""How such a one is made in a directory, and what is said of it, below that."""
