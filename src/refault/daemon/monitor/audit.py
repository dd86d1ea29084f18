"""What clients do to the VM, on record: a line of the log for each command that changes it, and for those
refused, of which one client's are spared where they come fast: a client can send more than a log takes.

No value of an argument is told that was not reviewed (`refault.qmp.access`): there are secrets among them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from refault.daemon.host.repeats import repeats
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.caller import Caller
from refault.qmp.access import record
from refault.qmp.session import Request

_log = logging.getLogger("refault.audit")
_log.setLevel(logging.INFO)  # told where it was asked for, whatever else is not


@dataclass(frozen=True)
class Recorded:
    """A client that is put on record: where it came, and who it is."""

    vm: str
    listener: Address
    caller: Caller

    def tell(self, request: Request) -> None:
        """A command of it goes to QEMU, or is refused."""
        caller, refused = self.caller, request.refusal is not None
        told = record(request.name.decode(errors="replace"), request.arguments())
        fields = {
            "VM": self.vm,
            "LISTENER": str(self.listener),
            "CLIENT": request.client.number,
            "CLIENT_UID": caller.uid,
            "CLIENT_PID": caller.pid,
            "CLIENT_COMM": caller.comm if caller.uid is not None else None,
            "CLIENT_EXE": caller.exe if caller.uid is not None else None,
            "CLIENT_ADDRESS": caller.address,
            "COMMAND": told.command,
            "REFUSED": int(refused),
        }
        extra: dict[str, object] = {
            "journal": {name: str(value) for name, value in fields.items() if value is not None}
        }
        if refused:  # nothing of what the client says is in this: it would choose how often it is told
            extra |= repeats((self.vm, str(self.listener), request.client.number), "refused")
        _log.info(
            "%s: client %d (%s) at %s: %s%s%s",
            self.vm,
            request.client.number,
            caller,
            self.listener,
            "refused: " if refused else "",
            told,
            " (out-of-band)" if request.oob else "",
            extra=extra,
        )
