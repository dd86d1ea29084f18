"""What QEMU is given of the doors at which it waits."""

from __future__ import annotations

import logging
import socket
from typing import cast

import pytest

from refault.daemon.near.doors import Doors, Owner
from refault.daemon.near.local import LocalLeg


class Vm:
    """Its QEMU takes the end of one door while a channel comes by the other."""

    name = "vm1"

    def __init__(self) -> None:
        self.ends = [socket.socketpair() for _ in range(2)]
        self.legs = [LocalLeg(f"leg{at}", ours, 0) for at, (ours, _) in enumerate(self.ends)]
        self.given = 0

    @property
    def monitor(self) -> Vm:
        return self

    async def execute(self, command: str, _: object, **__: object) -> object:
        self.given += command == "getfd"
        self.legs[1].close()
        return {}


async def test_the_end_of_a_door_that_a_channel_takes_meanwhile_is_not_given_to_qemu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vm = Vm()
    doors = Doors(cast(Owner, vm), lanes=False)
    for leg in vm.legs:
        doors.taken(leg)
    with caplog.at_level(logging.WARNING):
        assert await doors.give_back()
    assert vm.given == 1
    assert not caplog.records
    for pair in vm.ends:
        for end in pair:
            end.close()
