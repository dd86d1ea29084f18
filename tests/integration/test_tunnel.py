"""`refault tunnel` as its users see it: two processes, real sockets, and connections that get lost."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.tunnels import Tunnel, copies, refault, tunnel

from refault.lab.channel import free_port
from refault.session.handshake import Dialling, Keys, Untrusted
from refault.session.wire import MESSAGE_BYTES, Code, Flag, Kind, Message

RESET = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_bytes(os.urandom(32))
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def both(key: Path) -> Iterator[Tunnel]:
    """A tunnel with a key, and without losses at first."""
    with tunnel("--key", str(key)) as both:
        yield both


def hears(sock: socket.socket, words: bytes) -> None:
    """That is what comes next; a connection that was lost in the midst of it may bring it in pieces."""
    heard = b""
    while len(heard) < len(words) and (more := sock.recv(len(words) - len(heard))):
        heard += more
    assert heard == words


def test_no_byte_is_wrong_and_no_loss_seen(both: Tunnel) -> None:
    """Hundreds of losses at any byte, the handshake's included, over three connections at once; one is
    idle."""
    pairs = [both.connect() for _ in range(2)]
    idle = both.connect()
    both.proxy.lose(300, 150_000)
    for copy in copies(pairs, 12 << 20, 2 << 20):
        copy.check(60)
    assert both.proxy.lost > 150
    for sender, receiver in (idle, idle[::-1]):
        sender.sendall(b"still here")
        hears(receiver, b"still here")
    both.proxy.lose(0, 1)
    for sock in (*idle, *(each for pair in pairs for each in pair)):
        sock.close()


def test_the_server_may_speak_first_and_ends_pass_one_by_one(both: Tunnel) -> None:
    client, server = both.connect()
    with client, server:
        server.sendall(b"greeting")
        hears(client, b"greeting")
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        hears(server, b"question")
        assert server.recv(100) == b""
        server.sendall(b"answer")
        hears(client, b"answer")
        server.close()
        assert client.recv(100) == b""


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("reading", [True, False], ids=["reading", "with full buffers"])
def test_a_reset_is_a_reset_at_the_other_end(both: Tunnel, who: int, reading: bool) -> None:
    """Behind what had come before it, as without a tunnel; also where nobody reads."""
    pair = both.connect()
    here, there = pair[who], pair[1 - who]
    with there:
        here.sendall(b"last words")
        hears(there, b"last words")
        if not reading:
            there.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    there.send(bytes(1 << 20))
            there.settimeout(20)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        here.close()
        with pytest.raises(ConnectionResetError):
            there.recv(100)


def test_unix_sockets_at_both_ends_and_a_slow_one_that_stalls_nobody(tmp_path: Path) -> None:
    near, target = tmp_path / "near", tmp_path / "target"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(target))
        listening.listen()
        with (
            refault("session:127.0.0.1:0", str(target)) as answers,
            refault(f"unix:{near}", f"session:127.0.0.1:{answers.port}"),
        ):

            def connect() -> tuple[socket.socket, socket.socket]:
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(20)
                client.connect(str(near))
                return client, listening.accept()[0]

            slow, slow_server = connect()
            slow.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while True:  # nobody reads it
                    sent += slow.send(bytes(1 << 20))
                    select.select([], [slow], [], 0.2)
            assert 64 << 10 <= sent < 64 << 20
            quick = connect()
            [there, back] = copies([quick], 4 << 20, 1 << 20)
            there.check(60)
            back.check(60)
            with slow, slow_server:
                slow_server.shutdown(socket.SHUT_RD)  # it takes no more, and says so
                slow.setblocking(True)  # one that polls is told nothing, with a tunnel or without
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 20, 0))
                with pytest.raises(BrokenPipeError):
                    slow.sendall(bytes(64 << 20))
                slow_server.sendall(b"and still speaks")
                hears(slow, b"and still speaks")
            for sock in quick:
                sock.close()


def _say(port: int, keys: Keys, hello: Message) -> tuple[socket.socket, Message | None]:
    """A handshake with the session side; None where it came to nothing."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    dialling = Dialling(keys, hello, proven=False)
    data: bytes | Message = dialling.begin()
    while isinstance(data, bytes):
        sock.sendall(data)
        answer = sock.recv(MESSAGE_BYTES, socket.MSG_WAITALL)
        try:
            data = dialling.heard(answer)
        except Untrusted:
            return sock, None
    return sock, data


def test_strangers_end_nothing_and_cost_little(both: Tunnel, key: Path) -> None:
    """Of another key, without one, with a HELLO that was said before, with no HELLO at all, and many who say
    nothing."""
    client, server = both.connect()
    port, before = both.session.port, both.session.memory()
    new = Message(Kind.HELLO, os.urandom(16), 0, 1, flags=Flag.NEW)
    for keys in (Keys(), Keys(bytes(32))):
        sock, welcome = _say(port, keys, new)
        assert welcome is None
        assert sock.recv(1) == b""
        sock.close()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"QEVM" + bytes(1 << 20))
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    quiet = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(300)]
    for sock in quiet[:170]:  # those that came first had to go
        assert sock.recv(1) == b""
    sock, known = _say(port, Keys(key.read_bytes()), new)
    assert known is not None
    assert known.code is Code.OK
    again, stale = _say(port, Keys(key.read_bytes()), new)
    assert stale is not None
    assert (stale.code, stale.attempt) == (Code.STALE, 1)
    for each in (*quiet, sock, again):
        each.close()
    client.sendall(b"all the same")
    hears(server, b"all the same")
    assert both.session.memory() - before < 8 << 20
    client.close()
    server.close()


def test_another_refault_knows_nothing_a_target_may_refuse_and_patience_ends() -> None:
    """Each is a reset: a session that has come to the wrong host, a target where nobody listens, and no
    refault for longer than the patience."""
    with tunnel("--session-patience", "1") as here:
        where = f"tcp:127.0.0.1:{free_port()}"
        with refault("session:127.0.0.1:0", where) as other:
            client, server = here.connect()
            here.proxy.to = other.port
            here.proxy.lose(0, 1)
            with server, client, pytest.raises(ConnectionResetError):
                client.recv(1)
            here.plain.says("knows this session no more")
            with socket.create_connection(("127.0.0.1", here.plain.port), timeout=20) as client:
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
                other.says("cannot be reached: ")
        began = time.monotonic()
        with (
            socket.create_connection(("127.0.0.1", here.plain.port), timeout=20) as client,
            pytest.raises(ConnectionResetError),
        ):
            client.recv(1)
        assert 0.9 < time.monotonic() - began < 20
        here.plain.says("no connection to the other refault")
        for end in (here.plain, here.session):
            assert end.end() == 0
            assert "error" not in end.text().lower(), end.text()
