"""The destination's commands: `migrate-incoming`, and `migrate-recover`, out-of-band, after a loss."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import msgspec
import trio

from refault.daemon import far, ping
from refault.daemon.announce import Ends, announce
from refault.daemon.attempts import NotPausedYet
from refault.daemon.channels import AttemptFailed, Channels
from refault.daemon.destination_lanes import Gathering, QemuListens
from refault.daemon.doors import Door, Doors
from refault.daemon.far import FarListener
from refault.daemon.far_socket import alive, peek, watch_over
from refault.daemon.local import LocalLeg, reach
from refault.daemon.migration import Migration, inet_of, is_error
from refault.daemon.monitor import Answer, Forward, MonitorLost, QmpError, WatchedCommand, words
from refault.daemon.waiting_room import WaitingRoom
from refault.migration.endpoint import Endpoint, Inet, endpoint_of, with_uri
from refault.migration.messages import Kind, classify
from refault.migration.phase import Role
from refault.migration.recovery import Event, State

log = logging.getLogger("refault.migration")

RECOVER_TIMEOUT = 5.0
FIRST_COMMAND_TIMEOUT = 5.0
STALL_TIMEOUT = 20.0
"""How long a handshake may stand still: longer than at the source, which begins anew then."""
ADDRESS_TIMEOUT = 15.0
"""How long an address is listened at before the next one, or the same again, is tried; longer than a source
tries (source.HANDSHAKE_TIMEOUT)."""
REACH_TIMEOUT = 5.0
IN_FLIGHT = 0.4
"""What a source sent before it gave its channel up has arrived so long after its next connection."""
LIVES_AFTER = 3.0
"""A channel that is still there so long after `dead_after` since another came for it has shown that it lives
(cext/leg.c)."""
_NOT_PAUSED = "postcopy is paused"
_TOLD_BEFORE = "triggered already"
"""Up to 8.1 (migration/migration.c, qmp_migrate_recover): QEMU waits where it was told first."""


class Destination:
    """The role of the QEMU that the guest comes to."""

    role = Role.DESTINATION

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._doors = Doors(migration.vm, lanes=migration.lanes.count > 0)
        self._listeners: list[FarListener] = []
        self._scopes: list[trio.CancelScope] = []
        self._room = WaitingRoom()
        self._gathering = Gathering(migration, self._room)
        self._line: list[trio.socket.SocketType] = []
        """Recovered channels that QEMU does not wait for yet."""
        self._ends: Ends | None = None
        """Of the newest channel."""
        self._listens_at: str | None = None
        """Where QEMU listens by its command line, until it has been connected to."""
        self._hides_address = False
        self._asked_for: Endpoint | None = None

    # ---- clients' commands ----

    async def set_up(self, command: WatchedCommand) -> Forward | Answer:
        """A client's `migrate-incoming`: refault binds the address, QEMU gets a descriptor."""
        migration = self._migration
        if migration.channels is None:
            return Forward(on_reply=self._watch_reply)
        endpoint = inet_of(migration.endpoint)
        try:
            listener = await self._bind(endpoint)
        except OSError as error:
            migration.refused()
            return Answer(error=("GenericError", f"Failed to listen on {endpoint.uri}: {error}"))
        migration.addresses.moved(listener.endpoint)
        self._asked_for = listener.endpoint
        await self._bind_alternatives()
        try:
            uri = await self._doors.make_first()
        except (QmpError, trio.TooSlowError, OSError) as error:
            await migration.go_unrelayed(f"no local leg could be made: {words(error)}")
            return Forward(on_reply=self._watch_reply)
        return Forward(arguments=with_uri(command.arguments, uri), on_reply=self._watch_reply)

    def _watch_reply(self, reply: bytes) -> bytes:
        if is_error(reply):
            self._migration.refused()
        else:
            self._migration.accepted()
            if self._migration.channels is not None:
                self._migration.vm.start_soon(self._doors.lay)
        return reply

    async def serve(self, path: str) -> None:
        """A QEMU that listens at unix:`path` by its command line: refault binds the address that others are
        to know, and connects to QEMU when a migration begins there. Raises OSError.
        """
        migration = self._migration
        listener = await self._bind(inet_of(migration.endpoint))
        migration.addresses.moved(listener.endpoint)
        self._asked_for = listener.endpoint
        await self._bind_alternatives()
        self._listens_at = path
        self._hides_address = True
        migration.accepted()
        await self._doors.lay()

    async def adopt(self, endpoint: Endpoint) -> None:
        """A migration that was met at start-up: binds its address again. Raises OSError."""
        listener = await self._bind(inet_of(endpoint))
        self._asked_for = listener.endpoint
        await self._bind_alternatives()

    async def migrate_recover(self, command: WatchedCommand) -> Forward | Answer:
        """A client recovers by hand: our attempt makes way; refault binds its address where it is relayed."""
        migration = self._migration
        if not migration.under_way:
            return Forward()  # which QEMU refuses
        log.info("%s: a client recovers the destination by hand", migration.name)
        endpoint = endpoint_of(command.arguments)
        migration.feed(Event.CLIENT_RECOVERS)
        await migration.attempts.over()
        if migration.channels is None:
            return Forward(on_reply=migration.watch_move(endpoint))
        if not isinstance(endpoint, Inet):
            return Forward(on_reply=migration.watch_recovery)
        try:
            if endpoint not in (listener.endpoint for listener in self._listeners):
                await self._bind(endpoint)
                migration.addresses.add(endpoint)
                migration.remember()
        except OSError as error:
            migration.feed(Event.ATTEMPT_FAILED)
            return Answer(error=("GenericError", f"Failed to listen on {endpoint.uri}: {error}"))
        if self._doors.open is not None:
            return Answer(value={})  # QEMU waits already, and whoever comes to this address reaches it
        try:
            door = await self._doors.next()
        except (QmpError, trio.TooSlowError, OSError) as error:
            migration.feed(Event.ATTEMPT_FAILED)  # QEMU could not listen there itself: the address is ours
            return Answer(error=("GenericError", f"QEMU takes no descriptor: {words(error)}"))
        self._doors.told(door)

        def watch(reply: bytes) -> bytes:
            if is_error(reply):
                self._doors.refused(door)
                migration.feed(Event.ATTEMPT_FAILED)
            else:
                self._doors.taken(door)
            return reply

        return Forward(arguments=with_uri(command.arguments, door.uri), on_reply=watch)

    def show_address(self) -> Callable[[bytes], bytes] | None:
        """What makes query-migrate show the address that the client asked for; None: QEMU shows its own."""
        alternatives = self._migration.addresses.alternatives
        listeners = [listener for listener in self._listeners if listener.endpoint not in alternatives]
        hides = self._hides_address or self._migration.lanes.count > 0
        if not listeners or self._asked_for is None:
            return None

        def show(reply: bytes) -> bytes:
            decoded = msgspec.json.decode(reply)
            if not isinstance(decoded.get("return"), dict):
                return reply
            if "socket-address" in decoded["return"] and not hides:
                return reply
            decoded["return"]["socket-address"] = [
                listener.endpoint.as_socket_address() for listener in listeners
            ]
            return msgspec.json.encode(decoded)

        return show

    # ---- the far side ----

    async def _bind(self, endpoint: Inet) -> FarListener:
        listener = await FarListener.bind(endpoint, self._room)
        self._listeners.append(listener)
        self._migration.vm.start_soon(self._serve, listener)
        return listener

    async def _bind_alternatives(self) -> None:
        """Those of another network are listened at for the whole migration too, as far as they can be."""
        bound = [listener.endpoint for listener in self._listeners]
        for endpoint in self._migration.addresses.alternatives:
            if endpoint in bound:
                continue
            try:
                await self._bind(inet_of(endpoint))
            except (OSError, AttemptFailed) as error:
                log.warning(
                    "%s: cannot listen at --recover-uri %s: %s; a recovery must do without it",
                    self._migration.name,
                    endpoint.uri,
                    error,
                    extra=self._migration.attempts.repeats(endpoint.uri, str(error)),
                )

    async def _serve(self, listener: FarListener) -> None:
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            await listener.serve(self._offer)

    async def _offer(self, connection: trio.socket.SocketType, kind: Kind) -> None:
        begins = self._doors.first is not None or self._listens_at is not None
        if begins:
            with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):
                await self._migration.vm.ask_encrypted()  # its client may have set it since
        encrypted = self._migration.vm.encrypted
        if encrypted is not (kind is Kind.ENCRYPTED):
            log.warning(
                "%s: closed a connection that begins with %s: tls-creds is %s here",
                self._migration.name,
                kind.value,
                "set" if encrypted else "not set",
            )
        elif encrypted and self._migration.lanes.count:
            log.warning("%s: closed a connection: TLS on more than one is not relayed", self._migration.name)
        elif encrypted:
            # Nothing can be read, so what it is follows from what is waited for.
            if begins:
                await self._begin(connection)
            else:
                await self._wait_in_line(connection)
        elif kind is Kind.MULTIFD:
            if self._migration.lanes.multifd:
                await self._gathering.offer_multifd(connection)
        elif kind is Kind.FRESH:
            await self._begin(connection)
        elif kind is Kind.PING and not await self._answer(connection):
            log.info("%s: a source that asked whether we are ready went away", self._migration.name)
        elif not await self._is_ours(connection):
            log.warning("%s: closed a connection that recovers another VM, or none", self._migration.name)
        else:
            await self._wait_in_line(connection)

    async def _answer(self, connection: trio.socket.SocketType) -> bool:
        """Tells a source that asks (ping.py) when our QEMU waits for it; True if a recovered channel follows.

        One that is told nothing in the end has not been resumed, and asks again.
        """
        with trio.move_on_after(far.FIRST_BYTES_TIMEOUT):
            while self._doors.open is None and alive(connection):
                with trio.move_on_after(0.5):  # the peer may go while we wait for our own QEMU
                    await self._doors.wanted.wait()
        if self._doors.open is None or not await ping.answer(connection):
            return False
        with trio.move_on_after(far.FIRST_BYTES_TIMEOUT):
            return classify(await peek(connection)) is Kind.RESUMED
        return False

    async def _begin(self, connection: trio.socket.SocketType) -> None:
        migration = self._migration
        if migration.channels is None or (self._doors.first is None and self._listens_at is None):
            log.warning("%s: closed a connection that begins a migration: one is under way", migration.name)
            return
        door, self._doors.first = self._doors.first, None
        if door is None:
            door = await self._reach_listener()
        if door is None:
            return
        before = migration.channel
        try:
            joined = await self._join(migration.channels, door, connection, recovered=False)
        except (AttemptFailed, OSError):
            self._doors.first = self._as_it_was(door, before)
            raise
        if not joined:
            self._doors.first = door

    async def _reach_listener(self) -> LocalLeg | None:
        """The leg to a QEMU that listens by its command line; None where it cannot be had."""
        migration = self._migration
        path, self._listens_at = self._listens_at, None
        if path is None:
            return None
        # Its client may have set since what the relay cannot carry.
        reason, lanes = await migration.vm.judge(migration.endpoint, Role.DESTINATION)
        if reason is None and lanes.count:
            reason = "it has more than one connection"
        if reason is not None:
            log.error(
                "%s: closed a connection that begins a migration, for the relay cannot carry it: %s. Let QEMU"
                " listen at an address of its own for that one",
                migration.name,
                reason,
            )
        else:
            try:
                return await reach(path, migration.vm.qemu_pid, REACH_TIMEOUT)
            except OSError as error:
                log.error("%s: QEMU cannot be reached for the migration: %s", migration.name, error)
        self._listens_at = path
        return None

    async def _wait_in_line(self, connection: trio.socket.SocketType) -> None:
        """Until QEMU waits for it, it goes away, or the channel that it would replace has shown its life.

        The last to come is the first to be taken: its peer had most reason to come.
        """
        migration = self._migration
        watch_over(connection)
        self._line.append(connection)
        came = trio.current_time()
        lives_after = migration.vm.patience.dead_after + LIVES_AFTER
        arrived_before: int | None = None
        try:
            while alive(connection):
                if (
                    self._doors.open is not None
                    and self._line[-1] is connection
                    and migration.channels is not None
                ):
                    door, self._doors.open = self._doors.open, None
                    before = migration.channel
                    try:
                        joined = await self._join(migration.channels, door, connection, recovered=True)
                    except (AttemptFailed, OSError):
                        self._doors.open = self._as_it_was(door, before)
                        raise
                    if not joined:
                        self._doors.taken(door)
                        return
                    migration.vm.start_soon(self._watch_handshake, migration.channels)
                    return
                if migration.channels is not None and migration.policy.state is State.RUNNING:
                    waited = trio.current_time() - came
                    arrived = migration.channels.relay.look().forward_bytes
                    if waited > lives_after or (arrived_before is not None and arrived > arrived_before):
                        log.warning("%s: closed a connection that recovers what is not lost", migration.name)
                        return
                    if waited > IN_FLIGHT:
                        arrived_before = arrived
                with trio.move_on_after(0.5):  # the peer may go while we wait for our own QEMU
                    await self._doors.wanted.wait()
        finally:
            self._line.remove(connection)
        log.info("%s: a recovered channel went away before QEMU was ready for it", migration.name)

    async def _join(
        self,
        channels: Channels,
        door: Door,
        connection: trio.socket.SocketType,
        *,
        recovered: bool,
    ) -> bool:
        """Gives QEMU a channel; False where not all of it came, and QEMU still waits."""
        self._ends = Ends.of(connection)
        if isinstance(door, QemuListens):
            return await self._gathering.connect(channels, door, connection, recovered=recovered)
        channels.join(door, connection, recovered=recovered)
        return True

    def _as_it_was(self, door: Door, before: int) -> Door | None:
        """A door through which nobody came after all; None where a part of a channel did, `before` being the
        last one, or QEMU's leg went with it."""
        gone = isinstance(door, LocalLeg) and door.socket.fileno() < 0
        return None if gone or self._migration.channel != before else door

    async def _is_ours(self, connection: trio.socket.SocketType) -> bool:
        """Whether a recovered channel asks for all our RAM blocks; for any where ours are not known."""
        channels = self._migration.channels
        known = {block.name for block in channels.relay.blocks()} if channels is not None else set()
        with trio.move_on_after(FIRST_COMMAND_TIMEOUT):
            return await far.asks_for(connection, known)
        return False

    async def _watch_handshake(self, channels: Channels) -> None:
        migration = self._migration
        channel = channels.channel
        if not await channels.handshake_stalls(STALL_TIMEOUT) or channels.channel != channel:
            return
        if await channels.may_end_handshake():
            log.warning("%s: no end of the recovery handshake in %g s", migration.name, STALL_TIMEOUT)
            channels.abandon(channel)
            migration.feed(Event.CHANNEL_LOST)

    # ---- recovery ----

    async def attempt(self) -> None:
        """One recovery: `migrate-recover`, and QEMU waits for the source, for as long as need be."""
        migration = self._migration
        if migration.channels is None:
            await self._attempt_unrelayed()
            return
        await self._bind_alternatives()  # what could not be had at first may be there by now
        if self._doors.open is None:
            door = self._doors.doubtful or await self._doors.next()
            with trio.CancelScope(shield=True):  # once sent it runs, whether or not we wait for the reply
                await self._tell(door)
        await migration.attempts.issued()
        migration.vm.start_soon(self._doors.lay)

    def path_changed(self) -> bool:
        """Whether that served a recovery: the source is to find us as soon as it can."""
        lost = self._migration.policy.state in (State.WAITING, State.ATTEMPTING, State.OPEN)
        return lost and self._ends is not None and announce(self._ends)

    async def _tell(self, door: Door) -> None:
        try:
            await self._recover(door.uri)
        except QmpError as error:
            if door is self._doors.doubtful and _TOLD_BEFORE in error.desc:
                self._doors.taken(door)
                return
            self._doors.refused(door)
            raise NotPausedYet if _NOT_PAUSED in error.desc else error from None
        except MonitorLost:
            self._doors.doubt(door)
            raise
        except trio.TooSlowError:
            self._doors.taken(door)  # it may wait there, so the next attempt goes on with this one
            raise
        self._doors.taken(door)

    async def _attempt_unrelayed(self) -> None:
        addresses = self._migration.addresses
        if not addresses.order():
            raise AttemptFailed("the address of the lost channel is not known; name one with --recover-uri")
        endpoint = addresses.order()[0]
        addresses.tried(endpoint)
        try:
            await self._recover(endpoint.uri)
        except QmpError as error:
            if _NOT_PAUSED in error.desc:
                raise NotPausedYet from None
            raise
        await self._migration.attempts.issued()
        await trio.sleep(ADDRESS_TIMEOUT)  # a recovery ends this attempt, and so this wait
        if self._migration.policy.state is State.OPEN:
            raise AttemptFailed(f"the source did not come to {endpoint.uri} in {ADDRESS_TIMEOUT:g} s")

    async def _recover(self, uri: str) -> None:
        migration = self._migration
        await migration.vm.monitor.execute("migrate-recover", {"uri": uri}, oob=True, timeout=RECOVER_TIMEOUT)
        migration.counters.attempts += 1
        log.info("%s: recovery attempt %d: QEMU waits for the source (%s)",
                 migration.name, migration.counters.attempts, uri,
                 extra=migration.attempts.repeats("attempt", uri))  # fmt: skip

    async def settle(self) -> None:
        """Lays new descriptors in place of those that were used."""
        migration = self._migration
        if migration.channels is not None and migration.policy.state is State.RUNNING:
            await self._doors.refill()

    async def prepare_to_stop(self) -> bool:
        """Gives QEMU our ends of those doors at which it waits; False where it did not take one."""
        return await self._doors.give_back()

    async def clean_up(self) -> None:
        """Frees the address, and takes back from QEMU the descriptors that it did not need."""
        for scope in self._scopes:
            scope.cancel()
        for listener in self._listeners:
            listener.close()
        self._scopes.clear()
        self._listeners.clear()
        await self._doors.close()
