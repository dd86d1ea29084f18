"""Ends the return path of a lost channel at the source before its forward stream, and sees QEMU take note.

Before 8.2 QEMU's return-path thread may come to the end of a lost channel only when a resume has opened the
next one, whose file it then frees (migration/migration.c, source_return_path_thread). It closes the socket
itself, after it has forgotten the lost file, and while the forward stream stands nobody else closes it. So
once QEMU has closed the socket though only the return path has ended, the thread is out of the way.
"""

from __future__ import annotations

import socket

import trio

from refault.daemon.kernel.process import holds

_LOOK = 0.0002
_PATIENCE = 0.05


async def end_first(ours: socket.socket, pid: int, inode: int) -> bool:
    """Ends what QEMU reads from `ours` and waits until it has closed its own end, socket `inode`.

    False where that was not seen in time, or may not be looked at.
    """
    try:
        if not holds(pid, inode):
            return False
        ours.shutdown(socket.SHUT_WR)
        with trio.move_on_after(_PATIENCE):
            while holds(pid, inode):  # noqa: ASYNC110 - another process tells of nothing
                await trio.sleep(_LOOK)
            return True
    except OSError:
        pass
    return False
