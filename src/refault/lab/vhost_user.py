"""A vhost-user back end that does nothing but touch random pages of the guest's memory, in postcopy.

    python -m refault.lab.vhost_user SOCKET STATE

It serves a vhost-user-blk device that has no disk: enough of the protocol (QEMU's
docs/interop/vhost-user.rst) for it to be started and migrated. Where the guest arrives in postcopy it maps
the guest's memory under a userfaultfd that it hands to QEMU, and one thread touches a random page of the
biggest region every few milliseconds. STATE is a file of two u64: touches begun, touches done.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import itertools
import mmap
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.005
"""Seconds between two touches."""
STATE = struct.Struct("=QQ")

_PAGE = 4096
_HEADER = struct.Struct("=III")
_VERSION, _REPLY, _NEED_REPLY = 1, 4, 8  # in the flags
_MAX_FDS = 8
_REGIONS = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
# VHOST_USER_* requests.
_GET_FEATURES, _SET_MEM_TABLE, _SET_LOG_BASE, _GET_VRING_BASE = 1, 5, 6, 11
_GET_PROTOCOL_FEATURES, _GET_CONFIG = 15, 24
_POSTCOPY_ADVISE, _POSTCOPY_LISTEN, _POSTCOPY_END = 28, 29, 30
# VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VHOST_F_LOG_ALL.
_FEATURES = 1 << 32 | 1 << 30 | 1 << 26
# VHOST_USER_PROTOCOL_F_LOG_SHMFD, _REPLY_ACK, _PAGEFAULT, _CONFIG.
_PROTOCOL_FEATURES = 1 << 1 | 1 << 3 | 1 << 8 | 1 << 9
# linux/userfaultfd.h, x86-64.
_SYS_USERFAULTFD = 323
_UFFD_API, _UFFDIO_API, _UFFDIO_REGISTER, _REGISTER_MISSING = 0xAA, 0xC018AA3F, 0xC020AA00, 1

_libc = ctypes.CDLL(None, use_errno=True)  # its calls leave the interpreter lock, so a thread may wait in one
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@dataclass
class _Region:
    """A piece of the guest's memory as QEMU describes it, in bytes, and where its file is mapped here."""

    guest: int
    size: int
    qemu: int
    offset: int
    base: int = 0


def _userfaultfd() -> int:
    ufd: int = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if ufd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    fcntl.ioctl(ufd, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, 0, 0))
    return ufd


def _map(fd: int, size: int) -> int:
    address: int = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return address


class BackEnd:
    """One connection with QEMU."""

    def __init__(self, sock: socket.socket, state: mmap.mmap) -> None:
        self._sock = sock
        self._state = state
        self._ufd: int | None = None
        self._listening = False
        self._touching = False
        self._replies: dict[int, Callable[[bytes], bytes]] = {
            _GET_FEATURES: lambda _: struct.pack("=Q", _FEATURES),
            _GET_PROTOCOL_FEATURES: lambda _: struct.pack("=Q", _PROTOCOL_FEATURES),
            _GET_VRING_BASE: lambda payload: payload[:4] + bytes(4),
            _GET_CONFIG: lambda payload: payload,
            _SET_LOG_BASE: lambda _: bytes(8),
            _POSTCOPY_END: lambda _: bytes(8),
        }

    def run(self) -> None:
        """Answers until QEMU closes."""
        while (message := self._receive()) is not None:
            request, flags, payload, fds = message
            if request == _POSTCOPY_ADVISE:
                self._ufd = _userfaultfd()
                self._send(request, b"", self._ufd)
            elif request == _SET_MEM_TABLE and self._listening:
                self._map_for_postcopy(payload, fds)
                if flags & _NEED_REPLY:
                    self._send(request, bytes(8))
            elif request in self._replies:
                self._send(request, self._replies[request](payload))
            elif flags & _NEED_REPLY:
                self._send(request, bytes(8))
            self._listening = self._listening or request == _POSTCOPY_LISTEN
            for fd in fds:
                os.close(fd)

    def _receive(self) -> tuple[int, int, bytes, list[int]] | None:
        data, ancillary, _, _ = self._sock.recvmsg(
            _HEADER.size, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_WAITALL
        )
        if len(data) < _HEADER.size:
            return None
        fds = array.array("i")
        for _, _, cmsg in ancillary:
            fds.frombytes(cmsg)
        request, flags, size = _HEADER.unpack(data)
        payload = self._sock.recv(size, socket.MSG_WAITALL) if size else b""
        return request, flags, payload, list(fds)

    def _send(self, request: int, payload: bytes, *fds: int) -> None:
        message = _HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload
        socket.send_fds(self._sock, [message], fds)

    def _map_for_postcopy(self, payload: bytes, fds: list[int]) -> None:
        """As libvhost-user's vu_set_mem_table_exec_postcopy: QEMU is told where each region is mapped here,
        and only when it has said that it knows, faults are caught."""
        count, _ = _REGIONS.unpack_from(payload)
        regions = [_Region(*each) for each in _REGION.iter_unpack(payload[_REGIONS.size :])][:count]
        for fd, region in zip(fds, regions, strict=True):
            region.base = _map(fd, region.offset + region.size)
        told = (_REGION.pack(each.guest, each.size, each.base + each.offset, each.offset) for each in regions)
        self._send(_SET_MEM_TABLE, _REGIONS.pack(count, 0) + b"".join(told))
        self._receive()
        if self._ufd is None:
            raise RuntimeError("QEMU listens for postcopy without having advised it")
        for each in regions:
            what = struct.pack("=QQQQ", each.base, each.offset + each.size, _REGISTER_MISSING, 0)
            fcntl.ioctl(self._ufd, _UFFDIO_REGISTER, what)
        if not self._touching:
            self._touching = True
            big = max(regions, key=lambda region: region.size)
            thread = threading.Thread(target=self._touch, args=(big.base + big.offset, big.size), daemon=True)
            thread.start()

    def _touch(self, start: int, size: int) -> None:
        byte = ctypes.create_string_buffer(1)
        for count in itertools.count():
            STATE.pack_into(self._state, 0, count + 1, count)
            page = random.randrange(size // _PAGE)  # noqa: S311
            _libc.memcpy(byte, start + page * _PAGE, 1)
            STATE.pack_into(self._state, 0, count + 1, count + 1)
            time.sleep(INTERVAL)


def main(path: str, state: str) -> None:
    """Serves one QEMU."""
    Path(state).write_bytes(bytes(STATE.size))
    with socket.socket(socket.AF_UNIX) as listener, open(state, "r+b") as file:
        listener.bind(path)
        listener.listen()
        sock, _ = listener.accept()
        BackEnd(sock, mmap.mmap(file.fileno(), STATE.size)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
