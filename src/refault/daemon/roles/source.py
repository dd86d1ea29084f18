"""The source's commands: `migrate`, and `migrate` with `resume` after a loss."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import msgspec
import trio

from refault.daemon.far import ping
from refault.daemon.far.dial import REDIAL_TIMEOUT, connect_any, dial_in_course, outlast, reached
from refault.daemon.known.vm_state import QUERY_TIMEOUT
from refault.daemon.migration import Migration
from refault.daemon.monitor.monitor import Answer, Forward, QmpError, WatchedCommand, words
from refault.daemon.near.given import Given, given_in
from refault.daemon.near.local import Pair, hand_over, take_back
from refault.daemon.near.local_unix import Listening
from refault.daemon.recovery.doubt import TAKE_BACK, decide
from refault.daemon.relayed.channels import Channels
from refault.daemon.roles.dialling import DIALS, Dialling, resume
from refault.daemon.roles.source_lanes import DIAL_ADVICE, Opening
from refault.daemon.roles.source_session import keep_session_soon
from refault.migration.addresses import inet_of
from refault.migration.endpoint import Endpoint, Inet, endpoint_of, is_refused, with_uri
from refault.migration.phase import Role
from refault.migration.recovery import AttemptFailed, Event, NotPausedYet, State
from refault.migration.relayable import has_virtio_mem
from refault.migration.versions import abilities
from refault.qmp.replies import is_error

log = logging.getLogger("refault.migration")

CONNECT_TIMEOUT = 5.0
HANDSHAKE_TIMEOUT = 10.0
HANDSHAKE_ADVICE = "look at refault and QEMU of this VM on the other host: whoever accepted says nothing"
PAUSE_TOLD_WITHIN = 0.01


class Source:
    """The role of the QEMU that the guest leaves."""

    role = Role.SOURCE
    laid: tuple[str, ...] = ()
    """QEMU is laid nothing ahead."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._course = migration.course
        self._vm = migration.course.vm
        self._opening: Opening | None = None
        """The channel that QEMU opens, or opened last, where it has lanes."""
        self._dialling = Dialling(self._course)
        self._given: Given | None = None
        """The connection that QEMU was to begin with."""

    async def set_up(self, command: WatchedCommand) -> Forward | Answer:
        """A client's `migrate`: QEMU gets it with an address of ours, where the relay can carry it, and the
        other host is dialled once QEMU has taken it (source_lanes.py); else it passes as it came."""
        migration = self._migration
        channels = migration.channels
        if channels is not None:
            try:
                if await self._may_receive_unsent():
                    channels.relay.trust_bitmaps()
                near = await self._near()
                await self._name_other_host(migration.endpoint)
            except (OSError, QmpError, trio.TooSlowError) as error:
                await migration.go_unrelayed(f"no local leg could be made: {words(error)}")
            else:
                given = self._given = given_in(self._vm.monitor, command)
                to = inet_of(migration.endpoint)
                if given is not None:
                    self._vm.owed.will_close(given.name)
                self._opening = Opening(
                    self._course, channels, near, to, deque(), recovered=False, given=given
                )
                return Forward(with_uri(command.arguments, near.uri), on_reply=self._watch_reply)
        return Forward(on_reply=self._watch_reply)

    async def _name_other_host(self, endpoint: Endpoint | None) -> None:
        """Tells QEMU the name that it would take from the client's address. Raises what `execute` raises."""
        if self._vm.nameless and isinstance(endpoint, Inet) and endpoint.host:
            await self._vm.owed.name_other_host(self, endpoint.host)

    async def _near(self) -> Listening | Pair:
        """What QEMU is to be told of. Raises OSError, and what `execute` raises."""
        course = self._course
        vm = self._vm
        try:
            if await vm.comes_to_sockets():
                vm.sockets.make_if_missing()
                return vm.sockets.listen(shut=True)
            reason = f"QEMU does not come to a socket in {vm.sockets.directory}"
        except OSError as error:
            reason = str(error)
        if course.lanes.count or vm.encrypted:
            # A pair has one connection; and QEMU's monitor stands while a TLS handshake waits on one.
            raise OSError(reason)
        log.info("%s: %s; it gets a descriptor, and begins before the other host is reached", vm.name, reason)
        return Pair(await hand_over(vm.monitor, Role.SOURCE))

    async def _may_receive_unsent(self) -> bool:
        """Whether the destination may rightly have pages that were never sent (cext/tracker.h)."""
        try:
            devices = await self._vm.monitor.execute("query-memory-devices", timeout=QUERY_TIMEOUT)
        except QmpError:
            return True
        return has_virtio_mem(devices)

    async def _join(
        self,
        channels: Channels,
        endpoints: Sequence[Inet],
        *,
        shield: trio.CancelScope | None = None,
        asks: bool = False,
        given: Given | None = None,
    ) -> str:
        """Makes both legs of a recovered channel and joins them, where it `asks` only when there is an
        answer; the address at which QEMU finds its end. `given`: what is connected already.

        Dialled last and joined at once: a connection to a QEMU that listens for a recovery must not be given
        up. Raises OSError, AttemptFailed, and what `execute` raises.
        """
        if self._course.lanes.count:
            return await self._open(channels, endpoints, shield=shield, asks=asks)
        monitor = self._vm.monitor
        local = await hand_over(monitor, Role.SOURCE)
        try:
            if given is not None:
                connection, endpoint = given.lend(), given.endpoint
            else:
                connection, endpoint = await dial_in_course(endpoints, REDIAL_TIMEOUT, shield)
            with connection:
                self._course.addresses.tried(endpoint)
                if shield is not None and asks:
                    await self._ask(connection, endpoint, shield)
                there = reached(connection, endpoint)
                channels.join(local, connection, recovered=True)
                keep_session_soon(self._course, channels, there)
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
        *,
        shield: trio.CancelScope | None,
        asks: bool,
    ) -> str:
        """The same where QEMU opens more than one connection: at a private socket, as it comes to them.

        The other host is dialled ahead for all that QEMU opens at once: of such a QEMU no part of a recovered
        channel may fail.
        """
        course = self._course
        vm = self._vm
        if self._opening is not None:
            self._opening.cancel()
            await self._opening.over.wait()
        channels.check_room()
        sockets = vm.sockets
        sockets.make_if_missing()
        at_once = course.lanes.preempt and not abilities(vm.version).preempt_comes_late
        listening = sockets.listen()
        connections: deque[trio.socket.SocketType] = deque()
        try:
            connection, endpoint = await dial_in_course(endpoints, REDIAL_TIMEOUT, shield)
            connections.append(connection)
            there = reached(connection, endpoint)
            if at_once:
                connections.append((await connect_any([there], REDIAL_TIMEOUT))[0])
            if shield is not None and asks:
                await self._ask(connection, endpoint, shield)
        except BaseException:
            listening.close()
            for connection in connections:
                connection.close()
            raise
        course.addresses.tried(endpoint)
        self._opening = Opening(course, channels, listening, there, connections, recovered=True)
        vm.start_soon(self._opening.run)
        return self._opening.uri

    async def _ask(
        self, connection: trio.socket.SocketType, endpoint: Inet, shield: trio.CancelScope
    ) -> None:
        """Returns when there is an answer (ping.py); meanwhile `shield` is down.

        Raises OSError where the connection ends before.
        """
        course = self._course
        vm = self._vm
        shield.shield = False
        try:
            await ping.ask(connection, vm.patience.dead_after)
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                await ping.answered(connection)
                return
            log.warning(
                "%s: %s has accepted and does not answer for %g s; going on to wait (%s)",
                course.name,
                endpoint.uri,
                HANDSHAKE_TIMEOUT,
                HANDSHAKE_ADVICE,
            )
            await ping.answered(connection)
        except trio.Cancelled:
            vm.start_soon(outlast, connection.dup())
            raise
        finally:
            shield.shield = True

    def _watch_reply(self, reply: bytes) -> bytes:
        if is_error(reply):
            if self._given is not None:
                self._vm.owed.keeps(self._given.name)
            self._migration.refused()
        else:
            self._migration.accepted()
            if self._given is not None:
                self._vm.start_soon(self._vm.owed.close, self._given.name)
            if self._opening is not None:
                self._vm.start_soon(self._opening.run)
        return reply

    def show_failure(self, reply: bytes) -> bytes:
        """Makes query-migrate say why the other host was not reached: QEMU knows of our socket alone."""
        failure = self._opening.failure if self._opening is not None else None
        if self._opening is None or failure is None or b"error-desc" not in reply:
            return reply
        decoded = msgspec.json.decode(reply)
        match decoded:
            case {"return": {"error-desc": str(error)} as answer} if self._opening.is_meant(error):
                return msgspec.json.encode({**decoded, "return": {**answer, "error-desc": failure}})
        return reply

    def path_changed(self) -> bool:
        """Nothing to add to the attempt that is made then."""
        return False

    async def client_resumes(self, command: WatchedCommand) -> Forward | Answer:
        """A client recovers by hand: our attempt makes way, and its channel goes through the relay if it can.

        Where a channel works or a handshake is under way that stands: QEMU refuses the command by itself.
        """
        migration = self._migration
        course = self._course
        vm = self._vm
        if command.arguments.get("uri") == TAKE_BACK:
            why_not = decide(self._course, migration.channels)
            return Answer(error=("GenericError", why_not)) if why_not else Answer()
        if not course.under_way or is_refused(command.arguments, vm.version):
            return Forward()  # which QEMU refuses
        log.info("%s: a client recovers the source by hand", course.name)
        if await self._dialling.goes_on():
            return Answer(error=("GenericError", DIALS))
        state = course.policy.state
        works = state in (State.RUNNING, State.GIVEN_UP) and migration.cost_of_stopping() is not None
        if works or state in (State.OPEN, State.HANDSHAKE, State.HELD):
            return Forward()
        course.feed(Event.CLIENT_RECOVERS)
        await migration.attempts.over()
        if await self._dialling.goes_on():
            course.feed(Event.ATTEMPT_FAILED)
            return Answer(error=("GenericError", DIALS))
        if migration.cost_of_stopping() is not None:
            return Forward()  # our attempt had its channel already, and that stands
        endpoint = endpoint_of(command.arguments)
        channels = migration.channels
        if channels is None:
            return Forward(on_reply=self._dialling.watch(endpoint, migration.watch_move(endpoint)))
        given = given_in(vm.monitor, command) if not course.lanes.count else None
        if given is not None:
            endpoint = given.endpoint
        if not isinstance(endpoint, Inet):
            return Forward(on_reply=migration.watch_recovery)
        try:
            await self._name_other_host(endpoint)
            uri = await self._join(channels, [endpoint], given=given)
        except (AttemptFailed, OSError) as error:
            course.feed(Event.ATTEMPT_FAILED)
            return Answer(error=("GenericError", str(error)))
        except (QmpError, trio.TooSlowError):
            return Forward(on_reply=migration.watch_recovery)
        finally:
            if given is not None:
                given.close()  # unless it is joined
        course.addresses.moved(endpoint)
        channel = channels.channel
        if given is not None:
            vm.owed.will_close(given.name)

        def watch(reply: bytes) -> bytes:
            if is_error(reply):
                self._not_taken(channels, channel)
                if given is not None:
                    vm.owed.keeps(given.name)
            elif channels.channel == channel:
                channels.answered()
                course.remember()
            if given is not None and not is_error(reply):
                vm.start_soon(vm.owed.close, given.name)
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
        course = self._course
        vm = self._vm
        await self._must_be_paused()
        if await self._dialling.goes_on():
            raise NotPausedYet
        course.counters.attempt()
        addresses = course.addresses.order()
        if migration.channels is None:
            del addresses[1:]  # QEMU dials, and only one
        where = ", then ".join(endpoint.uri for endpoint in addresses) or "?"
        log.info(
            "%s: recovery attempt %d: migrate with resume to %s",
            course.name,
            course.counters.attempts,
            where,
            extra=course.repeats("attempt", where),
        )
        if not addresses:
            raise AttemptFailed("the address of the lost channel is not known; name one with --recover-uri")
        if migration.channels is None or not await migration.channels.closing.return_path_over():
            await trio.sleep(abilities(vm.version).resume_after)
        # Once the other host has been dialled and QEMU has its command, the course is run to its end.
        with trio.CancelScope(shield=True) as shield:
            if migration.channels is not None:
                await self._resume_relayed(migration.channels, addresses, shield)
            else:
                [endpoint] = addresses
                course.addresses.tried(endpoint)
                await self._dialling.resume(endpoint, shield)
        await migration.attempts.issued()
        await self._until_active()

    async def _must_be_paused(self) -> None:
        """Raises NotPausedYet where QEMU has not. An event says so; where none comes soon QEMU is asked."""
        course = self._course
        vm = self._vm
        with trio.move_on_after(PAUSE_TOLD_WITHIN):
            await course.pause_told.wait()
            return
        status = (await vm.query("query-migrate")).get("status")
        if course.pause_told.is_set():
            return  # meanwhile, and the answer is older
        if isinstance(status, str) and status != course.status:
            course.is_found(status)
        if status != "postcopy-paused":
            if status in ("completed", "failed"):
                course.on_status(str(status))
            raise NotPausedYet

    async def _resume_relayed(
        self, channels: Channels, addresses: Sequence[Endpoint], shield: trio.CancelScope
    ) -> None:
        endpoints = [endpoint for endpoint in addresses if isinstance(endpoint, Inet)]
        vm = self._vm
        # Under TLS nothing of ours can be said, and a handshake that nobody answers leaves QEMU paused.
        asks = not (abilities(vm.version).pauses_again_in_handshake or vm.encrypted)
        await self._name_other_host(self._migration.endpoint)  # where a stop has set it back
        try:
            uri = await self._join(channels, endpoints, shield=shield, asks=asks)
        except OSError as error:
            raise AttemptFailed(f"{error} ({DIAL_ADVICE})") from None
        channel = channels.channel
        try:
            await resume(vm.monitor, uri)
        except QmpError:
            self._not_taken(channels, channel)
            raise
        except trio.TooSlowError:
            if vm.encrypted and channels.unread and not channels.word.came_through(channel):
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
        course = self._course
        vm = self._vm
        if migration.channels is not None:
            if await migration.channels.handshake_stalls(HANDSHAKE_TIMEOUT):
                await self._out_of_time(migration.channels)
            return
        while course.policy.state is State.OPEN:
            await trio.sleep(0.05)
            dials = await self._dialling.goes_on()
            if (await vm.query("query-migrate")).get("status") == "postcopy-paused" and not dials:
                raise AttemptFailed("QEMU could not connect, or lost the connection again")

    async def _out_of_time(self, channels: Channels) -> None:
        course = self._course
        if await channels.may_end_handshake():
            channels.abandon(channels.channel)
            raise AttemptFailed(
                f"no end of the recovery handshake in {HANDSHAKE_TIMEOUT:g} s ({HANDSHAKE_ADVICE})"
            )
        log.warning(
            "%s: the recovery handshake takes over %g s; this QEMU does not survive a channel closed in it,"
            " so it is held open until the other host answers (%s)",
            course.name,
            HANDSHAKE_TIMEOUT,
            HANDSHAKE_ADVICE,
        )

    def takes_leg(self, *, goes_on: bool) -> None:
        """Dials where the session goes on."""
        channels, endpoint = self._migration.channels, self._migration.endpoint
        if goes_on and channels is not None and isinstance(endpoint, Inet):
            keep_session_soon(self._course, channels, endpoint, goes_on=True)

    def give_way(self) -> None:
        """Nothing of an ended migration is waited for at a source."""

    async def settle(self) -> None:
        """A source needs nothing laid ahead."""

    async def prepare_to_stop(self) -> bool:
        """A source has no legs but the one that is joined."""
        return True

    async def clean_up(self) -> None:
        """Takes back from QEMU what it held for the migration's last moments, and what it was told of it."""
        await self._vm.owed.put_back(self)
        if self._opening is not None:
            await self._opening.clear()
        self._vm.sockets.remove_if_empty()
        await take_back(self._vm.monitor, *self._course.kept_before)
        if self._migration.channels is not None:
            await self._migration.channels.kept.let_go()

    async def cancel(self, command: WatchedCommand) -> Forward | Answer:
        """`migrate_cancel` in postcopy: answered as QEMU 10.0 does (qmp_migrate_cancel).

        Older ones hang while paused, and else end what the destination's guest still needs (5.2, 7.2).
        """
        vm = self._vm
        if abilities(vm.version).refuses_cancel_in_postcopy:
            return Forward(on_reply=self._watch_cancel)
        try:
            status = (await vm.query("query-migrate")).get("status")
        except (QmpError, trio.TooSlowError):
            status = self._course.status
        if not str(status).startswith("postcopy-"):
            return Forward(on_reply=self._watch_cancel)
        return Answer(error=("GenericError", "Postcopy migration in progress, cannot cancel."))

    def _watch_cancel(self, reply: bytes) -> bytes:
        """A QEMU that is cancelled while it connects waits for the end of that."""
        if self._opening is not None and not self._opening.joined.is_set() and not is_error(reply):
            self._opening.cancel()
        return reply
