"""A migration of the lab's pair over QMP by hand: what the lab needs itself, and recovery without refault
(the floor).
"""

from __future__ import annotations

from typing import Any

import trio

from .channel import Channel
from .qmp_client import QmpClient

CAPABILITIES = ("postcopy-ram", "events")
PRECOPY_BANDWIDTH = 1 << 20
"""Bytes per second at which no guest of the lab completes in precopy: it writes more, even where its vCPUs
are kept waiting. Empty pages cost nothing, so that the first tenth of a guest has passed at once."""
DOWNTIME_LIMIT = 1
"""Milliseconds. By QEMU's default of 300 precopy completes when no more is left than passes in that time: at
64 MiB/s with 19 MiB, which is more than many a guest has."""


async def set_capabilities(qmp: QmpClient, *names: str) -> None:
    """Switches migration capabilities on, one end."""
    wanted = [{"capability": name, "state": True} for name in names]
    await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})


async def migration_status(qmp: QmpClient) -> str:
    """The status that query-migrate gives; `none` before the first migration."""
    return str((await qmp.execute("query-migrate")).get("status", "none"))


async def wait_status(qmp: QmpClient, *statuses: str, poll: float = 0.005) -> dict[str, Any]:
    """Asks query-migrate until the status is one of ``statuses``; the deadline is the caller's.

    Not for a destination in postcopy: its main thread may itself be waiting for a page.
    """
    while True:
        answer: dict[str, Any] = await qmp.execute("query-migrate")
        if answer.get("status") in statuses:
            return answer
        await trio.sleep(poll)


async def wait_sent(qmp: QmpClient, share: float) -> None:
    """Waits until precopy has sent ``share`` (up to 1) of the memory; the deadline is the caller's.

    Raises RuntimeError when the migration ends instead.
    """
    while True:
        answer = await qmp.execute("query-migrate")
        if answer.get("status") in ("failed", "completed", "cancelled"):
            raise RuntimeError(
                f"the migration is {answer['status']}: {answer.get('error-desc', 'no reason given')}"
            )
        ram = answer.get("ram", {"remaining": 1, "total": 1, "dirty-sync-count": 0})
        if ram["dirty-sync-count"] > 1 or ram["remaining"] <= (1 - share) * ram["total"]:
            return
        await trio.sleep(0.005)


async def start_postcopy(
    source: QmpClient,
    destination: QmpClient,
    channel: Channel,
    *,
    bandwidth: int = 0,
    precopy_bandwidth: int = PRECOPY_BANDWIDTH,
    precopy_share: float = 0.1,
    capabilities: tuple[str, ...] = CAPABILITIES,
) -> None:
    """Migrates over ``channel`` until the guest runs at the destination, in at most 30 s.

    ``bandwidth`` bounds what postcopy sends unasked, in bytes per second (0: no bound),
    ``precopy_bandwidth`` precopy, which sends about ``precopy_share`` of the memory first.
    """
    with trio.fail_after(30):
        since = await begin(
            source,
            destination,
            channel,
            bandwidth=bandwidth,
            precopy_bandwidth=precopy_bandwidth,
            capabilities=capabilities,
        )
        await wait_sent(source, precopy_share)
        await switch_to_postcopy(source, destination, since)


async def begin(
    source: QmpClient,
    destination: QmpClient,
    channel: Channel,
    *,
    bandwidth: int,
    precopy_bandwidth: int,
    capabilities: tuple[str, ...] = CAPABILITIES,
) -> int:
    """The first part of ``start_postcopy``, until `migrate` is answered; the deadline is the caller's.

    Gives the number of the destination's events before it.
    """
    for qmp in (source, destination):
        await set_capabilities(qmp, *capabilities)
    limits = {
        "max-bandwidth": precopy_bandwidth,
        "max-postcopy-bandwidth": bandwidth,
        "downtime-limit": DOWNTIME_LIMIT,
    }
    await source.execute("migrate-set-parameters", limits)
    since = len(destination.events)
    await destination.execute("migrate-incoming", {"uri": channel.target_uri})
    await channel.wait_open()
    await source.execute("migrate", {"uri": channel.uri})
    return since


async def switch_to_postcopy(source: QmpClient, destination: QmpClient, since: int) -> None:
    """The last part of ``start_postcopy``: until the guest runs at the destination, whose events from number
    ``since`` on count; the deadline is the caller's.
    """
    await source.execute("migrate-start-postcopy")
    await wait_status(source, "postcopy-active")
    await destination.wait_event(lambda event: event.name == "RESUME", since)


async def heard_of_postcopy(source: QmpClient, destination: QmpClient) -> None:
    """Waits until these clients too have been told that the guest runs at the destination, so that what they
    hear from then on is of later; needs the `events` capability. Ends within 30 s.

    Each connection tells in its own time, and a status may be told before its event.
    """
    with trio.fail_after(30):
        await source.wait_migration("postcopy-active")
        await destination.wait_event(lambda event: event.name == "RESUME")


async def recover(source: QmpClient, destination: QmpClient, channel: Channel, *, since: int = 0) -> None:
    """Recovers a lost channel as an operator's script would; needs the `events` capability. Ends within 20 s.

    ``since`` is the number of the destination's events before the loss. The channel is led to another port,
    for QEMU's first listener may still be open.
    """
    with trio.fail_after(20):
        await destination.wait_migration("postcopy-paused", since=since)
        await wait_status(source, "postcopy-paused", poll=0.001)
        await channel.retarget()
        resumed = len(destination.events)
        await destination.execute("migrate-recover", {"uri": channel.target_uri}, oob=True)
        await channel.wait_open()
        await source.execute("migrate", {"uri": channel.uri, "resume": True})
        await wait_status(source, "postcopy-active", "completed", poll=0.001)
        await destination.wait_migration("postcopy-active", "completed", since=resumed)


async def finish(source: QmpClient, timeout: float = 30.0) -> None:
    """Lifts the limit and waits for the source's `completed`; raises trio.TooSlowError after ``timeout``
    seconds.
    """
    with trio.fail_after(timeout):
        await source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        await wait_status(source, "completed")
