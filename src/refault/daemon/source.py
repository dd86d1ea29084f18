"""The source's commands: `migrate`, and `migrate` with `resume` after a loss."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import trio

from refault.daemon import ping
from refault.daemon.attempts import NotPausedYet
from refault.daemon.channels import AttemptFailed, Channels
from refault.daemon.dialling import DIALS, Dialling, resume
from refault.daemon.doubt import TAKE_BACK, decide
from refault.daemon.far_dial import REDIAL_TIMEOUT, connect_any, dial_in_course, outlast
from refault.daemon.local import hand_over, take_back
from refault.daemon.migration import Migration, inet_of, is_error
from refault.daemon.monitor import Answer, Forward, QmpError, WatchedCommand, words
from refault.daemon.source_lanes import Opening
from refault.daemon.vm_state import QUERY_TIMEOUT
from refault.migration.endpoint import Endpoint, Inet, endpoint_of, with_uri
from refault.migration.phase import Role
from refault.migration.recovery import Event, State
from refault.migration.relayable import has_virtio_mem
from refault.migration.versions import abilities

log = logging.getLogger("refault.migration")

CONNECT_TIMEOUT = 5.0
HANDSHAKE_TIMEOUT = 10.0
DIAL_ADVICE = "look whether refault runs for this VM on the other host, and at the route and firewall to it"
HANDSHAKE_ADVICE = "look at refault and QEMU of this VM on the other host: whoever accepted says nothing"
PAUSE_TOLD_WITHIN = 0.01


class Source:
    """The role of the QEMU that the guest leaves."""

    role = Role.SOURCE

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._opening: Opening | None = None
        """The channel that QEMU opens, or opened last, where it has lanes."""
        self._dialling = Dialling(migration)

    async def set_up(self, command: WatchedCommand) -> Forward | Answer:
        """A client's `migrate`: joined to the relay where it can be, else passed as it came."""
        migration = self._migration
        if migration.channels is not None:
            try:
                endpoint = inet_of(migration.endpoint)
                if (reason := await self._why_not()) is not None:
                    await migration.go_unrelayed(reason)
                    return Forward(on_reply=self._watch_reply)
                if await self._may_receive_unsent():
                    migration.channels.relay.trust_bitmaps()
                uri = await self._join(migration.channels, [endpoint], recovered=False)
            except (AttemptFailed, OSError) as error:
                log.warning("%s: migrate refused: %s", migration.name, error)
                migration.refused()
                return Answer(error=("GenericError", str(error)))
            except (QmpError, trio.TooSlowError) as error:
                await migration.go_unrelayed(f"no local leg could be made: {words(error)}")
            else:
                return Forward(with_uri(command.arguments, uri), on_reply=self._watch_reply)
        return Forward(on_reply=self._watch_reply)

    async def _why_not(self) -> str | None:
        """Why the other host is not to be dialled: QEMU will refuse the command, and a destination without a
        refault ends with a connection on which nothing comes; or no socket can be had for the lanes."""
        reply = await self._migration.vm.query("query-migrate")
        if reply.get("blocked-reasons") or reply.get("blocked"):  # since 6.0, and before
            return "QEMU does not migrate this guest now"
        if self._migration.lanes.count:
            try:
                self._migration.vm.sockets.make()
            except OSError as error:
                return f"no local leg could be made: {error}"
        return None

    async def _may_receive_unsent(self) -> bool:
        """Whether the destination may rightly have pages that were never sent (cext/tracker.h)."""
        try:
            devices = await self._migration.vm.monitor.execute("query-memory-devices", timeout=QUERY_TIMEOUT)
        except QmpError:
            return True
        return has_virtio_mem(devices)

    async def _join(
        self,
        channels: Channels,
        endpoints: Sequence[Inet],
        *,
        recovered: bool,
        course: trio.CancelScope | None = None,
        asks: bool = False,
    ) -> str:
        """Makes both legs and joins them, where it `asks` only when there is an answer; the address at which
        QEMU finds its end.

        Dialled last and joined at once: a connection to a QEMU that listens for a recovery must not be given
        up. Raises OSError, AttemptFailed, and what `execute` raises.
        """
        patience = REDIAL_TIMEOUT if recovered else CONNECT_TIMEOUT
        if self._migration.lanes.count:
            return await self._open(
                channels, endpoints, patience, recovered=recovered, course=course, asks=asks
            )
        monitor = self._migration.vm.monitor
        local = await hand_over(monitor, Role.SOURCE)
        try:
            connection, endpoint = await dial_in_course(endpoints, patience, course)
            with connection:
                self._migration.addresses.tried(endpoint)
                if course is not None and asks:
                    await self._ask(connection, endpoint, course)
                channels.join(local, connection, recovered=recovered)
        except BaseException:
            local.close()
            with trio.CancelScope(shield=True):
                await take_back(monitor, local.name)
            raise
        return local.uri

    async def _open(
        self,
        channels: Channels,
        endpoints: Sequence[Inet],
        patience: float,
        *,
        recovered: bool,
        course: trio.CancelScope | None,
        asks: bool,
    ) -> str:
        """The same where QEMU opens more than one connection: at a private socket, as it comes to them.

        The other host is dialled ahead for all that QEMU opens at once: of such a QEMU no part of a recovered
        channel may fail.
        """
        migration = self._migration
        if self._opening is not None:
            self._opening.cancel()
            await self._opening.over.wait()
        channels.check_room()
        sockets = migration.vm.sockets
        if not sockets.directory.exists():  # set_up makes it anew
            sockets.make()
        at_once = migration.lanes.preempt and not abilities(migration.vm.version).preempt_comes_late
        listening = sockets.listen()
        connections: deque[trio.socket.SocketType] = deque()
        try:
            connection, endpoint = await dial_in_course(endpoints, patience, course)
            connections.append(connection)
            if at_once:
                connections.append((await connect_any([endpoint], patience))[0])
            if course is not None and asks:
                await self._ask(connection, endpoint, course)
        except BaseException:
            listening.close()
            for connection in connections:
                connection.close()
            raise
        migration.addresses.tried(endpoint)
        self._opening = Opening(migration, channels, listening, endpoint, connections, recovered=recovered)
        migration.vm.start_soon(self._opening.run)
        return self._opening.uri

    async def _ask(
        self, connection: trio.socket.SocketType, endpoint: Inet, course: trio.CancelScope
    ) -> None:
        """Returns when there is an answer (ping.py); meanwhile `course` has no shield.

        Raises OSError where the connection ends before.
        """
        migration = self._migration
        course.shield = False
        try:
            await ping.ask(connection, migration.vm.patience.dead_after)
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                await ping.answered(connection)
                return
            log.warning(
                "%s: %s has accepted and does not answer for %g s; going on to wait (%s)",
                migration.name,
                endpoint.uri,
                HANDSHAKE_TIMEOUT,
                HANDSHAKE_ADVICE,
            )
            await ping.answered(connection)
        except trio.Cancelled:
            migration.vm.start_soon(outlast, connection.dup())
            raise
        finally:
            course.shield = True

    def _watch_reply(self, reply: bytes) -> bytes:
        if is_error(reply):
            self._migration.refused()
        else:
            self._migration.accepted()
            if self._migration.channels is not None:
                self._migration.channels.answered()
        return reply

    def path_changed(self) -> bool:
        """Nothing to add to the attempt that is made then."""
        return False

    async def client_resumes(self, command: WatchedCommand) -> Forward | Answer:
        """A client recovers by hand: our attempt makes way, and its channel goes through the relay if it can.

        Where a channel works or a handshake is under way that stands: QEMU refuses the command by itself.
        """
        migration = self._migration
        if command.arguments.get("uri") == TAKE_BACK:
            why_not = decide(migration)
            return Answer(error=("GenericError", why_not)) if why_not else Answer()
        if not migration.under_way:
            return Forward()  # which QEMU refuses
        log.info("%s: a client recovers the source by hand", migration.name)
        if await self._dialling.goes_on():
            return Answer(error=("GenericError", DIALS))
        state = migration.policy.state
        works = state in (State.RUNNING, State.GIVEN_UP) and migration.cost_of_stopping() is not None
        if works or state in (State.OPEN, State.HANDSHAKE, State.HELD):
            return Forward()
        migration.feed(Event.CLIENT_RECOVERS)
        await migration.attempts.over()
        if await self._dialling.goes_on():
            migration.feed(Event.ATTEMPT_FAILED)
            return Answer(error=("GenericError", DIALS))
        if migration.cost_of_stopping() is not None:
            return Forward()  # our attempt had its channel already, and that stands
        endpoint = endpoint_of(command.arguments)
        channels = migration.channels
        if channels is None:
            return Forward(on_reply=self._dialling.watch(endpoint))
        if not isinstance(endpoint, Inet):
            return Forward(on_reply=migration.watch_recovery)
        try:
            uri = await self._join(channels, [endpoint], recovered=True)
        except (AttemptFailed, OSError) as error:
            migration.feed(Event.ATTEMPT_FAILED)
            return Answer(error=("GenericError", str(error)))
        except (QmpError, trio.TooSlowError):
            return Forward(on_reply=migration.watch_recovery)
        migration.addresses.moved(endpoint)
        channel = channels.channel

        def watch(reply: bytes) -> bytes:
            if is_error(reply):
                self._not_taken(channels, channel)
            elif channels.channel == channel:
                channels.answered()
                migration.remember()
            return migration.watch_recovery(reply)

        return Forward(with_uri(command.arguments, uri), on_reply=watch)

    def _not_taken(self, channels: Channels, channel: int) -> None:
        """QEMU did not take the command that names what `_join` made."""
        if self._opening is not None:
            self._opening.cancel()
        else:
            channels.abandon(channel)

    async def attempt(self) -> None:
        """One recovery: is it paused, dial, hand over, resume, and wait until QEMU is active again."""
        migration = self._migration
        await self._must_be_paused()
        if await self._dialling.goes_on():
            raise NotPausedYet
        migration.counters.attempts += 1
        addresses = migration.addresses.order()
        if migration.channels is None:
            del addresses[1:]  # QEMU dials, and only one
        where = ", then ".join(endpoint.uri for endpoint in addresses) or "?"
        log.info(
            "%s: recovery attempt %d: migrate with resume to %s",
            migration.name,
            migration.counters.attempts,
            where,
            extra=migration.attempts.repeats("attempt", where),
        )
        if not addresses:
            raise AttemptFailed("the address of the lost channel is not known; name one with --recover-uri")
        if migration.channels is None or not await migration.channels.closing.return_path_over():
            await trio.sleep(abilities(migration.vm.version).resume_after)
        # Once the other host has been dialled and QEMU has its command, the course is run to its end.
        with trio.CancelScope(shield=True) as course:
            if migration.channels is not None:
                await self._resume_relayed(migration.channels, addresses, course)
            else:
                [endpoint] = addresses
                migration.addresses.tried(endpoint)
                await self._dialling.resume(endpoint, course)
        await migration.attempts.issued()
        await self._until_active()

    async def _must_be_paused(self) -> None:
        """Raises NotPausedYet where QEMU has not. An event says so; where none comes soon QEMU is asked."""
        migration = self._migration
        with trio.move_on_after(PAUSE_TOLD_WITHIN):
            await migration.pause_told.wait()
            return
        status = (await migration.vm.query("query-migrate")).get("status")
        if isinstance(status, str) and status != migration.status:
            migration.status = status
        if status != "postcopy-paused":
            if status in ("completed", "failed"):
                migration.on_status(str(status))
            raise NotPausedYet

    async def _resume_relayed(
        self, channels: Channels, addresses: Sequence[Endpoint], course: trio.CancelScope
    ) -> None:
        endpoints = [endpoint for endpoint in addresses if isinstance(endpoint, Inet)]
        vm = self._migration.vm
        # Under TLS nothing of ours can be said, and a handshake that nobody answers leaves QEMU paused.
        asks = not (abilities(vm.version).pauses_again_in_handshake or vm.encrypted)
        try:
            uri = await self._join(channels, endpoints, recovered=True, course=course, asks=asks)
        except OSError as error:
            raise AttemptFailed(f"{error} ({DIAL_ADVICE})") from None
        channel = channels.channel
        try:
            await resume(vm.monitor, uri)
        except QmpError:
            self._not_taken(channels, channel)
            raise
        except trio.TooSlowError:
            if vm.encrypted and channels.unread:
                channels.abandon(channel)  # it waits in the TLS handshake, and answers nobody till its end
            raise
        if self._opening is not None:
            with trio.move_on_after(CONNECT_TIMEOUT):
                await self._opening.joined.wait()
            if not self._opening.joined.is_set():
                self._opening.cancel()
                raise AttemptFailed("QEMU took the command but did not connect")
        channels.answered()

    async def _until_active(self) -> None:
        """Waits for the end of the handshake, which the policy hears of by other ways."""
        migration = self._migration
        if migration.channels is not None:
            if await migration.channels.handshake_stalls(HANDSHAKE_TIMEOUT):
                await self._out_of_time(migration.channels)
            return
        while migration.policy.state is State.OPEN:
            await trio.sleep(0.05)
            dials = await self._dialling.goes_on()
            if (await migration.vm.query("query-migrate")).get("status") == "postcopy-paused" and not dials:
                raise AttemptFailed("QEMU could not connect, or lost the connection again")

    async def _out_of_time(self, channels: Channels) -> None:
        migration = self._migration
        if await channels.may_end_handshake():
            channels.abandon(channels.channel)
            raise AttemptFailed(
                f"no end of the recovery handshake in {HANDSHAKE_TIMEOUT:g} s ({HANDSHAKE_ADVICE})"
            )
        log.warning(
            "%s: the recovery handshake takes over %g s; this QEMU does not survive a channel closed in it,"
            " so it is held open until the other host answers (%s)",
            migration.name,
            HANDSHAKE_TIMEOUT,
            HANDSHAKE_ADVICE,
        )

    async def settle(self) -> None:
        """A source needs nothing laid ahead."""

    async def prepare_to_stop(self) -> bool:
        """A source has no legs but the one that is joined."""
        return True

    async def clean_up(self) -> None:
        """Takes back from QEMU what it held for the migration's last moments."""
        await take_back(self._migration.vm.monitor, *self._migration.kept_before)
        if self._migration.channels is not None:
            await self._migration.channels.kept.let_go()
        if self._opening is not None:
            self._opening.cancel()
            self._migration.vm.sockets.remove()

    async def cancel(self, command: WatchedCommand) -> Forward | Answer:
        """`migrate_cancel` in postcopy: answered as QEMU 10.0 does (qmp_migrate_cancel).

        Older ones hang while paused, and else end what the destination's guest still needs (5.2, 7.2).
        """
        vm = self._migration.vm
        if abilities(vm.version).refuses_cancel_in_postcopy:
            return Forward()
        try:
            status = (await vm.query("query-migrate")).get("status")
        except (QmpError, trio.TooSlowError):
            status = self._migration.status
        if not str(status).startswith("postcopy-"):
            return Forward()
        return Answer(error=("GenericError", "Postcopy migration in progress, cannot cancel."))
