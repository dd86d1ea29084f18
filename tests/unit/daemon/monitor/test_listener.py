"""Binding: whose mode and group a socket file gets, when it is removed, and both families of TCP."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from refault.daemon.kernel.unix_diag import listens
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.listener import Bound, ListenError, NoDirectoryError, bind_tcp, bind_unix, check
from refault.daemon.monitor.socket_file import Access

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="files are given to others")


@pytest.fixture(autouse=True)
def any_umask() -> Iterator[None]:
    old = os.umask(0o007)
    yield
    os.umask(old)


@pytest.fixture
def at(tmp_path: Path) -> Address:
    return Address(str(tmp_path / "s"), server=True)


def is_now(address: Address) -> tuple[int, int, int]:
    status = os.lstat(address.sun_path)
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def stale(address: Address, mode: int) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(address.sun_path)
    os.chmod(address.sun_path, mode)


def test_by_default_it_is_for_us_alone_and_gone_with_us(at: Address) -> None:
    bound = bind_unix(at)
    assert is_now(at) == (0o600, os.geteuid(), os.getegid())
    assert bound.in_place
    assert bound.close() is None
    assert not os.path.lexists(at.sun_path)


def test_what_somebody_changed_stays_for_the_next_one(at: Address) -> None:
    for _ in range(3):
        bound = bind_unix(at)
        os.chmod(at.sun_path, 0o660)
        left = bound.close()
        assert left == Access(0o660, os.geteuid(), os.getegid())
        with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as client:
            client.connect(at.sun_path)
        bound = bind_unix(at)
        assert is_now(at)[0] == 0o660
        assert bound.close() == left


def test_what_was_known_of_it_holds_where_the_file_is_gone(at: Address) -> None:
    bound = bind_unix(at, Access(0o666, os.geteuid(), os.getegid()))
    assert is_now(at)[0] == 0o666
    bound.close()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_what_a_umask_made_says_nothing(at: Address, umask: int) -> None:
    """A QEMU was killed at that place."""
    stale(at, 0o777 & ~umask)
    bound = bind_unix(at)
    assert is_now(at)[0] == 0o600
    os.chmod(at.sun_path, 0o777 & ~umask)
    assert bound.close() is None
    assert not os.path.lexists(at.sun_path)


@ROOT
def test_the_group_of_a_stale_file_is_taken_over(at: Address) -> None:
    stale(at, 0o660)
    os.chown(at.sun_path, -1, 4242)
    bound = bind_unix(at)
    assert is_now(at) == (0o660, 0, 4242)
    bound.close()


@ROOT
def test_nothing_is_taken_over_from_others(at: Address) -> None:
    stale(at, 0o666)
    os.chown(at.sun_path, 4242, 4242)
    bound = bind_unix(at)
    assert is_now(at) == (0o600, 0, os.getegid())
    bound.close()


def test_nothing_is_taken_over_from_a_link_to_something_else(at: Address, tmp_path: Path) -> None:
    elsewhere = replace(at, path=str(tmp_path / "elsewhere"))
    stale(elsewhere, 0o666)
    os.link(elsewhere.sun_path, at.sun_path)
    bound = bind_unix(at)
    assert is_now(at)[0] == 0o600
    bound.close()


def test_a_link_at_the_place_is_no_socket(at: Address, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    os.symlink(tmp_path / "precious", at.sun_path)
    with pytest.raises(ListenError, match="a file that is no socket is there"):
        bind_unix(at)


def test_an_access_list_is_taken_over(at: Address) -> None:
    # POSIX ACL, version 2: user::rw-, user:4242:rw-, group::---, mask::rw-, other::---
    entries = [(1, 6, -1), (2, 6, 4242), (4, 0, -1), (0x10, 6, -1), (0x20, 0, -1)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + rights.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, rights, who in entries
    )
    bound = bind_unix(at)
    try:
        os.setxattr(at.sun_path, "system.posix_acl_access", acl)
    except OSError:
        bound.close()
        pytest.skip("no access lists on this file system")
    bound.close()
    bound = bind_unix(at)
    assert os.getxattr(at.sun_path, "system.posix_acl_access") == acl
    assert is_now(at)[0] == 0o660
    bound.close()


def test_an_option_says_what_it_is_each_time(at: Address) -> None:
    given = parse_address(f"{at.path},mode=0640,group={os.getegid()}", server=True)
    stale(at, 0o666)
    for _ in range(2):
        bound = bind_unix(given)
        assert is_now(at) == (0o640, os.geteuid(), os.getegid())
        os.chmod(at.sun_path, 0o666)
        assert bound.close() is None
        assert not os.path.lexists(at.sun_path)


@ROOT
def test_an_owner_and_a_group_by_number(at: Address) -> None:
    bound = bind_unix(replace(at, mode=0o660, owner=4242, group=4343))
    assert is_now(at) == (0o660, 4242, 4343)
    bound.close()
    assert not os.path.lexists(at.sun_path)


def forbid(monkeypatch: pytest.MonkeyPatch, *calls: str) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for call in calls:
        monkeypatch.setattr(os, call, forbidden)


def test_a_file_that_cannot_be_given_away_is_not_left(at: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "chown", "setxattr")
    with pytest.raises(ListenError, match="cannot give its file away: Operation not permitted"):
        bind_unix(replace(at, group=4242))
    assert not os.path.lexists(at.sun_path)


def test_a_group_that_cannot_be_given_again_opens_nothing(
    at: Address, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forbid(monkeypatch, "chown", "setxattr")
    bound = bind_unix(at, Access(0o660, os.geteuid(), 4242))
    assert is_now(at) == (0o600, os.geteuid(), os.getegid())
    assert "cannot give it group 4242 again" in caplog.text
    bound.close()


def test_another_ones_file_is_left_alone(at: Address) -> None:
    bound = bind_unix(at)
    os.unlink(at.sun_path)
    assert not bound.in_place
    stale(at, 0o600)
    assert not bound.in_place
    bound.close()
    assert os.path.lexists(at.sun_path)


def test_what_cannot_be_is_known_before(at: Address, tmp_path: Path) -> None:
    check(at)
    assert not os.path.lexists(at.sun_path)
    stale(at, 0o600)
    check(at)
    assert os.path.lexists(at.sun_path)
    os.unlink(at.sun_path)
    bound = bind_unix(at)
    with pytest.raises(ListenError, match="something listens there already"):
        check(at)
    with pytest.raises(ListenError, match="something listens there already"):
        bind_unix(at)
    bound.close()
    with pytest.raises(NoDirectoryError):
        check(replace(at, path=str(tmp_path / "none" / "s")))
    with pytest.raises(ListenError, match="a directory is there"):
        check(replace(at, path=str(tmp_path)))


def test_whoever_listens_is_not_connected_to(at: Address) -> None:
    """A QEMU with wait=on would be let go on by it."""
    bound = bind_unix(at)
    with pytest.raises(ListenError):
        check(at)
    with pytest.raises(BlockingIOError):
        bound.sock.accept()
    bound.close()


@pytest.mark.parametrize("tight", [True, False])
def test_an_abstract_name(tight: bool) -> None:
    at = Address(f"refault-test-{os.getpid()}", server=True, abstract=True, tight=tight)
    assert not listens(at.sun_path)
    bound = bind_unix(at)
    assert listens(at.sun_path)
    assert not listens(replace(at, tight=not tight).sun_path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(at.sun_path)
    with pytest.raises(ListenError, match="something listens there already"):
        check(at)
    bound.close()
    check(at)


def test_the_kernel_tells_who_listens_by_any_path(at: Address, tmp_path: Path) -> None:
    bound = bind_unix(at)
    os.symlink(tmp_path, tmp_path / "link")
    assert listens(replace(at, path=f"{tmp_path}/link/s").sun_path)
    assert not listens(replace(at, path=f"{tmp_path}/none").sun_path)
    bound.sock.close()
    assert os.path.lexists(at.sun_path)
    assert not listens(at.sun_path)


def reaches(bound: Bound, host: str) -> bool:
    """Who listens at the same port of another family may be anybody."""
    try:
        connection = socket.create_connection((host, bound.address.port), 5)
    except OSError:
        return False
    with connection:
        ours, _, _ = select.select(bound.socks, [], [], 1)
        for sock in ours:
            accepted, peer = sock.accept()
            accepted.close()
            if peer[1] == connection.getsockname()[1]:
                return True
    return False


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("tcp::0", {"127.0.0.1", "::1"}),
        ("tcp::0,ipv4=on", {"127.0.0.1"}),
        ("tcp::0,ipv6=on", {"::1"}),
        ("tcp::0,ipv4=off", {"::1"}),
        ("tcp::0,ipv4=on,ipv6=on", {"127.0.0.1", "::1"}),
        ("tcp:127.0.0.1:0", {"127.0.0.1"}),
        ("tcp:[::1]:0", {"::1"}),
        ("tcp:[::]:0", {"127.0.0.1", "::1"}),
    ],
)
async def test_the_families_of_tcp(text: str, reached: set[str]) -> None:
    bound = await bind_tcp(parse_address(text, server=True))
    assert bound.address.port
    assert {host for host in ("127.0.0.1", "::1") if reaches(bound, host)} == reached
    bound.close()


async def test_every_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),  # not this host's
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),  # twice in /etc/hosts
    ]

    async def getaddrinfo(*_: object, **__: object) -> object:
        return found

    monkeypatch.setattr("trio.socket.getaddrinfo", getaddrinfo)
    bound = await bind_tcp(Address(None, "somewhere", 0, server=True))
    assert {sock.getsockname()[0] for sock in bound.socks} == {"127.0.0.1", "::1"}
    assert {sock.getsockname()[1] for sock in bound.socks} == {bound.address.port}
    bound.close()


async def test_a_port_that_is_taken_in_one_family_is_not_the_kernels_choice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        bound = await bind_tcp(Address(None, "", port, server=True))  # as QEMU: where it can be
        assert [sock.family for sock in bound.socks] == [socket.AF_INET6]
        bound.close()
        bound = await bind_tcp(Address(None, "", port, server=True, to=min(port + 20, 65535)))
        assert bound.address.port > port
        assert len(bound.socks) == 2
        bound.close()


async def test_a_port_that_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=rf"^cannot listen on tcp:127\.0\.0\.1:{port}: something"):
            await bind_tcp(Address(None, "127.0.0.1", port, server=True))
    with pytest.raises(ListenError, match=r"^cannot listen on tcp:no\.such\.host\.invalid:1: "):
        await bind_tcp(Address(None, "no.such.host.invalid", 1, server=True))
