from __future__ import annotations

import os
import socket

import pytest

from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address, with_access
from refault.qmp.access import Callers, Rule


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/vm.qmp", Address("/run/vm.qmp")),
        ("unix:/run/vm.qmp", Address("/run/vm.qmp")),
        ("unix:relative", Address("relative")),
        ("./relative", Address("./relative")),
        ("tcp:localhost:4444", Address(None, "localhost", 4444)),
        ("tcp:[::1]:4444", Address(None, "::1", 4444)),
        ("unix:/run/vm.qmp,server=on", Address("/run/vm.qmp", server=True)),
        ("unix:/run/vm.qmp,server=on,wait=off", Address("/run/vm.qmp", server=True)),
        ("/run/vm.qmp,server=off", Address("/run/vm.qmp")),
        ("unix:/a,,b,,,server=on", Address("/a,b,", server=True)),
        ("/a,,b,server=on", Address("/a,b", server=True)),
        ("unix:@name,abstract=on", Address("@name", abstract=True)),
        ("unix:n,,n,abstract=on", Address("n,n", abstract=True)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address), server=address.server) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/s,server", Address("/s", server=True)),
        ("unix:/s,noserver", Address("/s")),
        ("unix:/s,server=yes,wait=no", Address("/s", server=True)),
        ("unix:/s,server=true,wait=false", Address("/s", server=True)),
        ("unix:/s,server=y,wait=n", Address("/s", server=True)),
        ("unix:/s,server,nowait", Address("/s", server=True)),
        ("unix:/s,server,wait", Address("/s", server=True, wait=True)),
        ("unix:/s,server=off,server=on", Address("/s", server=True)),
        ("unix:/s,server=on,", Address("/s", server=True)),
        ("unix:path=/a=b,server", Address("/a=b", server=True)),
        ("unix:server=on,path=/s", Address("/s", server=True)),
        ("unix:/other,server,path=/s", Address("/s", server=True)),
        ("unix:///s", Address("/s")),
        ("unix:/s,server,id=monitor,nodelay", Address("/s", server=True)),
        ("unix:/s,server,telnet=off,logappend=off", Address("/s", server=True)),
        ("unix:/s,reconnect=3", Address("/s", reconnect=3.0)),
        ("unix:/s,reconnect=0", Address("/s")),
        ("unix:/s,reconnect-ms=1500", Address("/s", reconnect=1.5)),
        ("unix:s,abstract,notight", Address("s", abstract=True, tight=False)),
        (
            "unix:/s,server,mode=0660,owner=0,group=root",
            Address("/s", server=True, mode=0o660, owner=0, group=0),
        ),
        ("tcp::4444,server", Address(None, "", 4444, server=True)),
        ("tcp:h:1,server,host=g,port=2", Address(None, "g", 2, server=True)),
        ("tcp:h:1,ipv4", Address(None, "h", 1, ipv4=True)),
        ("tcp:h:1,ipv4=off,ipv6=on", Address(None, "h", 1, ipv4=False, ipv6=True)),
        ("tcp:h:1,server,to=9", Address(None, "h", 1, server=True, to=9)),
        ("tcp:h:http,server", Address(None, "h", 80, server=True)),
    ],
)
def test_the_words_of_qemu(text: str, address: Address) -> None:
    assert parse_address(text) == address


def test_a_listener_listens_unless_told_otherwise() -> None:
    assert parse_address("tcp::4444", server=True) == Address(None, "", 4444, server=True)
    assert not parse_address("/run/vm.qmp,server=off", server=True).server


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected unix:/path, /path or tcp:HOST:PORT"),
        ("unix:", "expected unix:/path"),
        ("unix:,server=on", "there is no path"),
        ("unix:/a=b", "is written path=/path"),
        ("vm.qmp", "is ./vm.qmp"),
        ("~/vm.qmp", "'~' means nothing here"),
        ("unix:~/vm.qmp", "'~' means nothing here"),
        ("/run/qemu/", "that is a directory"),
        ("udp:localhost:1", "expected unix:/path"),
        ("http://localhost/qmp", "expected unix:/path"),
        ("chardev:monitor", "no other kinds of sockets"),
        ("tcp://localhost:1", "it is no URL"),
        ("tcp:localhost", "expected tcp:HOST:PORT"),
        ("tcp:localhost:qmp", "or a service's name"),
        ("tcp:localhost:", "or a service's name"),
        ("tcp:localhost:65536", "a port up to 65535"),
        ("tcp:localhost:-1", "a port up to 65535"),
        ("tcp:::1:4444", "stands in brackets"),
        ("tcp::4444", "no host"),
        ("unix:/run/vm.qmp,server,reconnect=1", "'reconnect' is for who connects"),
        ("unix:/run/vm.qmp,server,reconnect-ms=1", "'reconnect' is for who connects"),
        ("unix:/run/vm.qmp,reconnect=1,reconnect-ms=1", "name one"),
        ("unix:/run/vm.qmp,reconnect=soon", "reconnect is a number"),
        ("unix:/run/vm.qmp,reconnect=-1", "reconnect is a number"),
        ("unix:/run/vm.qmp,wait=on", "'wait' is for who listens"),
        ("unix:/run/vm.qmp,nowait", "'wait' is for who listens"),
        ("unix:/run/vm.qmp,server=maybe", "server is on or off"),
        ("unix:/run/vm.qmp,server,wat=off", "'wat' is not an option"),
        ("unix:/run/vm.qmp,server,telnet", "'telnet' is not possible: refault speaks QMP"),
        ("unix:/run/vm.qmp,server,websocket=on", "'websocket' is not possible"),
        ("tcp:localhost:1,server,tls-creds=tls0", "'tls-creds' is not possible: refault has no keys"),
        ("unix:/run/vm.qmp,server,logfile=/log", "'logfile' is not possible"),
        ("unix:/run/vm.qmp,server,mux=on", "'mux' is not possible"),
        ("unix:/run/vm.qmp,fd=3", "'fd' is not possible"),
        ("unix:/run/vm.qmp,host=h", "'host' is for tcp:"),
        ("unix:/run/vm.qmp,ipv4", "'ipv4' is for tcp:"),
        ("tcp:h:1,path=/s", "'path' is a unix socket's"),
        ("tcp:h:1,abstract", "'abstract' is for unix sockets"),
        ("tcp:h:1,ipv4=off,ipv6=off", "cannot both be off"),
        ("tcp:h:1,to=2", "'to' is for who listens"),
        ("tcp:h:9,server,to=2", "one from 9 to 65535"),
        ("tcp:h:1,server,mode=0660", "'mode' is for socket files"),
        ("unix:s,server,abstract,mode=0660", "for a socket file that refault makes"),
        ("/s,mode=0660", "for a socket file that refault makes"),
        ("/s,server,mode=rw", "a mode is like 0660"),
        ("/s,server,mode=07777", "a mode is like 0660"),
        ("/s,server,owner=no-such-user", "host has no such owner"),
        ("/s,server,group=no-such-group", "host has no such group"),
        ("unix:/" + "x" * 107, "at most 107 bytes, this has 108"),
        ("unix:" + "x" * 108 + ",abstract", "at most 107 bytes, this has 108"),
        ("/a\0b", r"has a control character (\x00)"),
        ("unix:/a\nb", r"has a control character (\n)"),
        ("tcp:h\x9b:1", r"has a control character (\x9b)"),
    ],
)
def test_what_is_no_address(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="address ") as caught:
        parse_address(text)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_longest_path() -> None:
    assert parse_address("unix:/" + "x" * 106)
    assert parse_address("unix:" + "x" * 107 + ",abstract")


def test_a_path_that_is_not_utf_8() -> None:
    path = os.fsdecode(b"/run/\xff")
    assert parse_address(f"unix:{path}").path == path


@pytest.mark.parametrize(
    ("options", "host", "family", "v6only"),
    [
        ("", "h", socket.AF_UNSPEC, False),
        (",ipv6=off", "h", socket.AF_INET, True),
        (",ipv6=on", "h", socket.AF_INET6, True),
        (",ipv4=off", "h", socket.AF_INET6, True),
        (",ipv4=off,ipv6=on", "h", socket.AF_INET6, True),
        (",ipv4=on", "h", socket.AF_INET, True),
        (",ipv4=on,ipv6=off", "h", socket.AF_INET, True),
        (",ipv4=on,ipv6=on", "h", socket.AF_UNSPEC, False),
        (",ipv4=on,ipv6=on", "", socket.AF_INET6, False),
    ],
)
def test_the_families_are_those_of_qemu(
    options: str, host: str, family: socket.AddressFamily, v6only: bool
) -> None:
    address = parse_address(f"tcp:{host}:1{options}", server=True)
    assert (address.family, address.v6only) == (family, v6only)


def test_one_place_however_it_is_written(tmp_path: os.PathLike[str]) -> None:
    os.symlink(tmp_path, f"{tmp_path}/link")
    places = {
        parse_address(text).place
        for text in (
            f"{tmp_path}/s",
            f"unix:{tmp_path}/s,server=on",
            f"unix://{tmp_path}/s",
            f"{tmp_path}/./s",
            f"{tmp_path}/link/s",
        )
    }
    assert len(places) == 1
    assert parse_address("tcp:[::1]:1").place == parse_address("tcp:[0:0::1]:1").place
    assert parse_address("tcp:Host:1").place == parse_address("tcp:host:1").place
    assert parse_address("unix:s,abstract").place != parse_address("unix:s").place


def test_who_may_speak_and_what() -> None:
    written = "/s,allow-user=0,allow-user=root,allow-group=4242,read-only,deny=quit,deny=device_add,audit=on"
    address = parse_address(written, server=True)
    assert address.callers == Callers(frozenset((0,)), frozenset((4242,)))
    assert address.rule == Rule(read_only=True, deny=frozenset(("quit", "device_add")), audit=True)
    assert address.mode == 0o666
    assert address == with_access(
        parse_address("/s", server=True),
        allow_users=["root"],
        allow_groups=[4242],
        read_only=True,
        deny=["device_add", "quit"],
        audit=True,
    )


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("/s", None),
        ("/s,read-only=on", None),
        ("/s,allow-user=0,mode=0660", 0o660),
        ("/s,allow-user=0,group=0", None),
        ("/s,allow-group=0,server=off", None),
        ("s,abstract,allow-group=0", None),
    ],
)
def test_a_socket_file_is_open_where_its_callers_decide(text: str, mode: int | None) -> None:
    assert parse_address(f"unix:{text}", server=True).mode == mode


@pytest.mark.parametrize(
    ("text", "server", "why"),
    [
        ("tcp:h:1,allow-user=0", True, "of who connects over TCP no user is known"),
        ("tcp:h:1,allow-group=0", True, "of who connects over TCP no user is known"),
        ("tcp:h:1,server=off,allow-user=0", True, "of who connects over TCP no user is known"),
        ("/s,allow-user=no-such-user", True, "this host has no such user: 'no-such-user'"),
        ("/s,allow-user=", True, "this host has no such user: ''"),
        ("/s,allow-group=no-such-group", True, "this host has no such group: 'no-such-group'"),
        ("/s,deny=", True, "'' is no command's name"),
        ("/s,deny=quit;stop", True, "'quit;stop' is no command's name"),
        ("/s,deny=qmp_capabilities", True, "it cannot be denied"),
        ("/s,read-only=maybe", True, "read-only is on or off"),
        ("/s,audit=maybe", True, "audit is on or off"),
        ("/s,hide-pause=0.5", True, "hide-pause is 0 or a number of seconds from 1 to 3600"),
        ("/s,hide-pause=nan", True, "hide-pause is 0 or"),
        ("/s,hide-pause=on", True, "hide-pause is 0 or"),
        ("/s,hide-pause=30", False, "are for where clients come"),
        ("/s,read-only=on", False, "are for where clients come"),
        ("/s,server=on,allow-user=0", False, "are for where clients come"),
        ("tcp:h:1,audit=off", False, "are for where clients come"),
    ],
)
def test_what_is_no_rule(text: str, server: bool, why: str) -> None:
    with pytest.raises(ValueError, match="address ") as caught:
        parse_address(text, server=server)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
