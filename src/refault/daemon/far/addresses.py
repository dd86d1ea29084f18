"""The addresses at which a destination's refault awaits the other host, over the whole of one migration."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from refault.daemon.far.listen import FarListener, Offer, look_up, why_not
from refault.daemon.far.waiting_room import WaitingRoom
from refault.migration.addresses import Addresses, inet_of
from refault.migration.endpoint import Endpoint, Inet
from refault.migration.recovery import AttemptFailed

log = logging.getLogger("refault.migration")


class FarAddresses:
    """Of one migration of the VM `name`, with its alternatives; `offer` gets who comes there
    (`FarListener.serve`). `repeats` gives the `extra` of a line that may come again and again."""

    def __init__(
        self,
        name: str,
        addresses: Addresses,
        room: WaitingRoom,
        offer: Offer,
        *,
        start_soon: Callable[..., None],
        repeats: Callable[..., dict[str, object]],
    ) -> None:
        self._name = name
        self._addresses = addresses
        self._start_soon = start_soon
        self._repeats = repeats
        self._room = room
        self._offer = offer
        self._listeners: list[FarListener] = []
        self._scopes: list[trio.CancelScope] = []
        self._reserved: list[FarListener] = []
        """Those of commands that QEMU has yet to answer."""
        self._looked_for: set[Endpoint] = set()
        """Alternatives that are being bound."""
        self._over = False

    async def reserve(self, endpoint: Inet) -> FarListener | None:
        """The address of a client's command, which QEMU has yet to take; None where it is ours already.

        Raises OSError.
        """
        if self._has(endpoint):
            return None
        listener = await FarListener.reserve(endpoint, await look_up(endpoint), self._room)
        self._reserved.append(listener)
        return listener

    def give_up(self, listener: FarListener | None) -> None:
        """QEMU did not take the command."""
        if listener in self._reserved:
            self._reserved.remove(listener)
            listener.close()

    def open(self, listener: FarListener) -> None:
        """QEMU took the command: from here on connections come. Raises OSError where somebody was faster."""
        try:
            listener.listen()
        except OSError:
            self.give_up(listener)
            raise
        if listener in self._reserved:
            self._reserved.remove(listener)
        self._serve_soon(listener)

    async def bind(self, endpoint: Inet) -> FarListener:
        """Reserves and opens an address. Raises OSError."""
        listener = await FarListener.bind(endpoint, self._room)
        self._serve_soon(listener)
        return listener

    def bind_alternatives_soon(self) -> None:
        """Those of another network are listened at for the whole migration too, as far as they can be."""
        self._start_soon(self._bind_alternatives)

    def shown(self) -> list[dict[str, object]]:
        """Where others are to come, as query-migrate tells it: as at QEMU, the last one first."""
        alternatives = self._addresses.alternatives
        return [
            address
            for listener in self._listeners
            if listener.endpoint not in alternatives
            for address in listener.socket_addresses
        ][::-1]

    def close(self) -> None:
        """Frees all of them: the migration has ended."""
        self._over = True
        for scope in self._scopes:
            scope.cancel()
        for listener in (*self._listeners, *self._reserved):
            listener.close()
        self._scopes.clear()
        self._listeners.clear()
        self._reserved.clear()

    def _has(self, endpoint: Endpoint) -> bool:
        return any(listener.endpoint == endpoint for listener in self._listeners)

    def _serve_soon(self, listener: FarListener) -> None:
        if self._over:
            listener.close()
            return
        self._listeners.append(listener)
        self._start_soon(self._serve, listener)

    async def _serve(self, listener: FarListener) -> None:
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            await listener.serve(self._offer)

    async def _bind_alternatives(self) -> None:
        for endpoint in self._addresses.alternatives:
            if self._over or endpoint in self._looked_for or self._has(endpoint):
                continue
            self._looked_for.add(endpoint)
            try:
                await self.bind(inet_of(endpoint))
            except (OSError, AttemptFailed) as error:
                log.warning(
                    "%s: cannot listen at --recover-uri %s: %s; a recovery must do without it",
                    self._name,
                    endpoint.uri,
                    error,
                    extra=self._repeats(endpoint.uri, str(error)),
                )
            finally:
                self._looked_for.discard(endpoint)


def words_of(endpoint: Inet, error: OSError) -> str:
    """Why an address could not be had, as QEMU says it (io/dns-resolver.c, and `why_not`)."""
    if error.errno is not None and error.errno < 0:  # socket.EAI_*
        return f"address resolution failed for {endpoint.host}:{endpoint.port}: {error.strerror}"
    return why_not(error)
