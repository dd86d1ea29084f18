"""The source's commands: `migrate`, and `migrate` with `resume` after a loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
import trio

from refault.daemon import far
from refault.daemon.local import LocalLeg, hand_over
from refault.daemon.migration import QUERY_TIMEOUT, AttemptFailed, Migration, NotPausedYet, inet_of
from refault.daemon.monitor import Answer, Forward, MonitorLost, QmpError, WatchedCommand
from refault.migration.endpoint import Endpoint, Inet, endpoint_of, with_descriptor
from refault.migration.phase import Role
from refault.migration.recovery import Event, State
from refault.migration.versions import abilities

log = logging.getLogger("refault.migration")

CONNECT_TIMEOUT = 5.0
MIGRATE_TIMEOUT = 10.0
HANDSHAKE_TIMEOUT = 10.0


class Source:
    """The role of the QEMU that the guest leaves."""

    role = Role.SOURCE

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._unused: LocalLeg | None = None

    async def migrate(self, command: WatchedCommand) -> Forward | Answer:
        """A client's `migrate`: joined to the relay where it can be, else passed as it came."""
        migration = self._migration
        endpoint = endpoint_of(command.arguments)
        if command.arguments.get("resume") is True:
            return await self._client_resumes(command, endpoint)
        reason = await migration.judge(endpoint)
        await migration.begin(self, endpoint, reason)
        if reason is None:
            try:
                return await self._relayed(command.arguments, inet_of(endpoint), recovered=False)
            except (QmpError, trio.TooSlowError, OSError) as error:
                await migration.begin(self, endpoint, f"no local leg could be made: {error}")
        return Forward(on_reply=self._watch_reply)

    async def _relayed(
        self, arguments: Mapping[str, object], endpoint: Inet, *, recovered: bool
    ) -> Forward | Answer:
        try:
            connection = await far.connect(endpoint, CONNECT_TIMEOUT)
        except OSError as error:
            log.warning("%s: migrate refused: %s", self._migration.name, error)
            if recovered:
                self._migration.feed(Event.ATTEMPT_FAILED)
            else:
                self._migration.refused()
            return Answer(error=("GenericError", str(error)))
        with connection:
            local = await hand_over(self._migration.monitor, Role.SOURCE)
            self._migration.join(local, connection, recovered=recovered)
        return Forward(arguments=with_descriptor(arguments, local.name), on_reply=self._watch_reply)

    def _watch_reply(self, reply: bytes) -> bytes:
        if b'"error"' in reply and "error" in msgspec.json.decode(reply):
            self._migration.refused()
        else:
            self._migration.accepted()
        return reply

    async def _client_resumes(self, command: WatchedCommand, endpoint: Endpoint | None) -> Forward | Answer:
        """A client recovers by hand: our attempt makes way, and its channel goes through the relay if it
        can."""
        migration = self._migration
        log.info("%s: a client recovers the source by hand", migration.name)
        migration.feed(Event.CLIENT_RECOVERS)
        if (
            migration.relay is None
            or not isinstance(endpoint, Inet)
            or migration.policy.state is not State.BY_CLIENT
        ):
            return Forward()
        migration.endpoint = endpoint
        return await self._relayed(command.arguments, endpoint, recovered=True)

    async def attempt(self) -> None:
        """One recovery: is it paused, dial, hand over, resume, and wait until QEMU is active again."""
        migration = self._migration
        status = (await migration.query("query-migrate")).get("status")
        if isinstance(status, str) and status != migration.status:
            migration.status = status
        if status != "postcopy-paused":
            if status in ("completed", "failed"):
                migration.on_status(str(status))
            raise NotPausedYet
        migration.counters.attempts += 1
        endpoint = migration.next_endpoint()
        log.info(
            "%s: recovery attempt %d: migrate with resume to %s",
            migration.name,
            migration.counters.attempts,
            endpoint.uri if endpoint else "?",
        )
        if migration.relay is not None:
            await self._attempt_relayed(inet_of(endpoint))
        elif endpoint is not None:
            await migration.monitor.execute(
                "migrate", {"uri": endpoint.uri, "resume": True}, timeout=MIGRATE_TIMEOUT
            )
        else:
            raise AttemptFailed("the address of the lost channel is not known; name one with --recover-uri")
        migration.feed(Event.ISSUED)
        await self._until_active()

    async def _attempt_relayed(self, endpoint: Inet) -> None:
        migration = self._migration
        connection = await far.connect(endpoint, CONNECT_TIMEOUT)
        with connection:
            local = await hand_over(migration.monitor, Role.SOURCE)
            with trio.CancelScope(
                shield=True
            ):  # between the two QEMU must not be left with a named, dead descriptor
                migration.join(local, connection, recovered=True)
                channel = migration.channel
                try:
                    await migration.monitor.execute(
                        "migrate", {"uri": f"fd:{local.name}", "resume": True}, timeout=MIGRATE_TIMEOUT
                    )
                except QmpError:
                    migration.abandon(channel)
                    raise

    async def _until_active(self) -> None:
        """Waits for the handshake; its success ends this attempt from outside, by cancellation or by the
        policy."""
        migration = self._migration
        deadline = trio.current_time() + HANDSHAKE_TIMEOUT
        while migration.policy.state in (State.OPEN, State.HANDSHAKE):
            await trio.sleep(0.05)
            if migration.policy.state is State.OPEN and migration.relay is None:
                status = (await migration.query("query-migrate")).get("status")
                if status == "postcopy-paused":
                    raise AttemptFailed("QEMU could not connect, or lost the connection again")
            if trio.current_time() > deadline:
                self._out_of_time()
                return

    def _out_of_time(self) -> None:
        migration = self._migration
        if migration.relay is None:
            migration.look_soon()
            return
        if abilities(migration.version).pauses_again_in_handshake:
            migration.abandon(migration.channel)
            raise AttemptFailed(f"no end of the recovery handshake in {HANDSHAKE_TIMEOUT:g} s")
        log.warning(
            "%s: the recovery handshake takes over %g s; this QEMU does not survive a channel closed in it,"
            " so it is held open until the other host answers",
            migration.name,
            HANDSHAKE_TIMEOUT,
        )

    async def settle(self) -> None:
        """A source needs nothing laid ahead."""

    async def clean_up(self) -> None:
        """A source leaves nothing with QEMU."""


async def cancel_while_paused(migration: Migration, command: WatchedCommand) -> Forward | Answer:
    """`migrate_cancel` in postcopy: answered as QEMU 10.0 does, for older ones hang (DESIGN, 6)."""
    if migration.role is not Role.SOURCE or abilities(migration.version).refuses_cancel_while_paused:
        return Forward()
    try:
        status = (await migration.query("query-migrate")).get("status")
    except (QmpError, MonitorLost, trio.TooSlowError):
        return Forward()
    if status != "postcopy-paused":
        return Forward()
    return Answer(error=("GenericError", "Postcopy migration in progress, cannot cancel."))


__all__ = ["CONNECT_TIMEOUT", "QUERY_TIMEOUT", "Source", "cancel_while_paused"]
