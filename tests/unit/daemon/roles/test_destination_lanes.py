"""Which connections are taken to belong to a channel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from refault.daemon.roles import destination_lanes
from refault.daemon.roles.destination_lanes import OTHER_HOST_AFTER, Gathering, Main, _Multifd
from refault.migration.messages import MultifdInit
from refault.migration.relayable import Lanes

UUID = bytes(16)


async def test_a_channel_from_elsewhere_is_taken_only_when_none_comes_from_the_main_ones_host(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Whose it is nobody knows where VMs have the same UUID, as those that were given none."""
    monkeypatch.setattr(destination_lanes, "alive", lambda _: True)
    monkeypatch.setattr(destination_lanes, "detached", lambda connection: connection)
    gathering = Gathering(cast(Any, SimpleNamespace(lanes=Lanes(multifd=2))), cast(Any, None))
    gathering._uuid = UUID

    def comes(number: int, peer: str) -> None:
        made: Any = f"{number} from {peer}"
        gathering._multifd.append(_Multifd(made, MultifdInit(UUID, number), 1, peer, trio.Event()))

    def taken() -> list[Any]:
        return gathering._take_multifd(main, since)

    main = Main(cast(Any, None), 0, "host", recovered=False)
    comes(0, "stranger")
    comes(1, "host")
    since = trio.current_time()
    assert taken() == []
    await trio.sleep(OTHER_HOST_AFTER * 0.9)
    assert taken() == []
    comes(0, "host")
    assert taken() == ["0 from host", "1 from host"]
    comes(1, "host")
    await trio.sleep(OTHER_HOST_AFTER * 0.2)
    assert taken() == ["0 from stranger", "1 from host"]
