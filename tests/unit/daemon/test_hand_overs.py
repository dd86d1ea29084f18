"""What a wrapper says when it hands a monitor over."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
from tests.support.exhausted import exhausted

from refault.config.hand_over import Handed
from refault.config.options import vm_options
from refault.daemon import hand_overs
from refault.daemon.fleet import Fleet
from refault.daemon.hand_overs import HandOvers, Offer, Refused
from refault.daemon.host.own_needs import Troubles
from refault.daemon.kernel.process import process_started
from refault.daemon.monitor.address import Address
from refault.daemon.record.hand_over import HandOver


def test_the_packet_of_wrapper_hand_over_h() -> None:
    assert Offer.read(b"refault-exec 1\0vm1\0c0ffee\x0027\0") == Offer("vm1", "c0ffee", 27)
    assert Offer.read(b"refault-exec 1\0\0\x003\0") == Offer("", "", 3)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"refault-exec 2\0vm1\0u\x003\0",
        b"refault-exec 1\0vm1\0u\x003",
        b"refault-exec 1\0vm1\0u\0\0",
        b"refault-exec 1\0vm1\0u\0-3\0",
        b"refault-exec 1\0vm1\0u\x003\0more",
        b"refault-exec 1\0vm1\0u\x003\0\0",
        b"refault-exec 1\0\xff\0u\x003\0",
        b"refault-exec 1\0vm1\0u\x009999999999\0",
    ],
)
def test_anything_else_is_refused(packet: bytes) -> None:
    with pytest.raises(Refused):
        Offer.read(packet)


class Offered:
    """A process that hands a monitor over, which is ours, and what it was told."""

    def __init__(self, directory: Path, name: str, uuid: str = "") -> None:
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.bind(str(directory / f"{name}{uuid[:1]}.sock"))
        self.monitor.listen(1)
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(directory / "exec"))
        packet = f"refault-exec 1\0{name}\0{uuid}\0{self.monitor.fileno()}\0".encode()
        socket.send_fds(self._connection, [packet], [self.monitor.fileno()])
        self._connection.setblocking(False)

    async def told(self) -> bytes:
        """The answer. The socket that comes with it is laid nowhere."""
        await trio.lowlevel.wait_readable(self._connection)
        answer, fds, _, _ = socket.recv_fds(self._connection, 4096, 1)
        for fd in fds:
            os.close(fd)
        return answer

    def ends(self) -> None:
        self._connection.close()

    def close(self) -> None:
        self._connection.close()
        self.monitor.close()


@contextlib.asynccontextmanager
async def taking(directory: Path) -> AsyncIterator[tuple[HandOvers, Fleet]]:
    fleet = Fleet(Troubles())
    taken = HandOvers(fleet)
    handed = Handed(Address(str(directory / "exec"), server=True), (), directory / "state")
    (directory / "state").mkdir()
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.run)
        await nursery.start(taken.run)
        await nursery.start(taken.serve, handed)
        yield taken, fleet
        nursery.cancel_scope.cancel()


async def test_who_takes_a_socket_and_does_nothing_with_it_is_in_nobodys_way_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_overs, "_MOST_AT_ONCE", 3)
    monkeypatch.setattr(hand_overs, "TAKEN_WITHIN", 2.0)
    with contextlib.ExitStack() as stack:
        async with taking(tmp_path):
            offered = [stack.enter_context(contextlib.closing(Offered(tmp_path, f"vm{n}"))) for n in range(4)]
            assert [await each.told() for each in offered] == [b"ok", b"ok", b"ok", b"no there are too many"]
            with trio.fail_after(9):
                while True:
                    with contextlib.closing(Offered(tmp_path, f"vm{len(os.listdir(tmp_path))}")) as again:
                        if await again.told() == b"ok":
                            return
                    await trio.sleep(0.05)


async def test_what_cannot_be_looked_at_is_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that has given up its rights, say: else nobody answers libvirt."""
    async with taking(tmp_path) as (_, fleet):
        with contextlib.closing(Offered(tmp_path, "vm1")) as offered:
            assert await offered.told() == b"ok"

            def hidden(*_: object) -> int:
                raise PermissionError(errno.EACCES, "Permission denied")

            monkeypatch.setattr(hand_overs, "socket_at", hidden)
            offered.ends()
            with trio.fail_after(9):
                while "vm1" not in fleet.members:
                    await trio.sleep(0.01)


def test_one_is_not_over_where_no_descriptor_is_left_to_look_at_its_process() -> None:
    started = process_started(os.getpid())
    assert started is not None
    with socket.socket() as given:
        inode = os.fstat(given.fileno()).st_ino
        hand_over = HandOver(
            name="vm1",
            pid=os.getpid(),
            started=started,
            number=given.fileno(),
            given=inode,
            libvirt=0,
            path="",
        )
        with exhausted():
            assert not hand_overs._is_over(hand_over)
        assert hand_overs._is_over(msgspec.structs.replace(hand_over, started=started + 1))
    assert hand_overs._is_over(hand_over)


async def test_what_is_being_handed_over_is_nobody_elses(tmp_path: Path) -> None:
    table = vm_options("vm1", {"qemu": Address("/nowhere"), "listen": ()}, tmp_path / "state" / "vm1")
    async with taking(tmp_path) as (_, fleet):
        with contextlib.closing(Offered(tmp_path, "vm1")) as offered:
            assert await offered.told() == b"ok"
            await fleet.want({"file": [table]})
            assert not fleet.members
            offered.ends()  # without having laid it: it goes its own way
            with trio.fail_after(9):
                while "vm1" not in fleet.members:
                    await trio.sleep(0.01)


async def test_the_second_of_a_name_is_called_by_its_uuid(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        async with taking(tmp_path):
            told = []
            for uuid in ("c0ffee", "beef", "a/b"):
                offered = stack.enter_context(contextlib.closing(Offered(tmp_path, "vm1", uuid)))
                told.append(await offered.told())
            assert told == [b"ok", b"ok", b"no there is a VM of the name vm1 already"]
            assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["beef", "vm1"]
