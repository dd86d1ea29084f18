"""Two relays whose far leg speaks TLS: a session is offered in the handshake, or nothing is."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refault.channel.relay import Relay, SessionEnd, SessionState
from refault.migration.phase import Role

from .streams import chunks
from .test_session import _exactly, _state, both, one, until

CEXT = Path(__file__).parents[3] / "cext"
CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus" / "fuzz_tls"
CCS = bytes.fromhex("140303000101")
RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""RFC 8446, 4.1.3."""
CHOSEN_1_3 = bytes.fromhex("002b00020304")
KEY_SHARE = bytes.fromhex("00330024001d0020") + bytes(32)
RANDOMS = os.urandom(32), os.urandom(32)
BEHIND = bytes.fromhex("1703030011") + os.urandom(17)
"""What comes behind in a handshake cannot be read."""
BEFORE, HERE, NOWHERE = range(3)


def record(kind: int, body: bytes) -> bytes:
    return bytes([kind, 3, 3]) + len(body).to_bytes(2, "big") + body


def hello(kind: int, body: bytes) -> bytes:
    return record(22, bytes([kind]) + len(body).to_bytes(3, "big") + body)


def client_hello(random: bytes = RANDOMS[0]) -> bytes:
    return hello(1, b"\x03\x03" + random + b"\x20" + bytes(32) + bytes.fromhex("0004130113020100") + b"\0\0")


def server_hello(
    *extensions: bytes, random: bytes = RANDOMS[1], version: bytes = b"\x03\x03", session: bytes = bytes(32)
) -> bytes:
    joined = b"".join(extensions)
    fixed = version + random + bytes([len(session)]) + session + b"\x13\x01\x00"
    return hello(2, fixed + len(joined).to_bytes(2, "big") + joined)


CLIENT, SERVER = client_hello(), server_hello(CHOSEN_1_3, KEY_SHARE)
NO_PLACE = {
    "TLS 1.2": server_hello(b"\xff\x01\x00\x01\x00") + CCS,
    "HelloRetryRequest": server_hello(CHOSEN_1_3, random=RETRY) + CCS,
    "no ChangeCipherSpec": SERVER + BEHIND,
    "a draft's version": server_hello(b"\x00\x2b\x00\x02\x7f\x1c", KEY_SHARE) + CCS,
    "in two records": record(22, SERVER[5:40]) + record(22, SERVER[40:]) + CCS,
    "one more message in the record": record(22, SERVER[5:] + b"\x08\x00\x00\x02\x00\x00") + CCS,
    "too large": server_hello(CHOSEN_1_3, b"\xff\xfe\x10\x00" + bytes(4096)) + CCS,
    "an alert": record(21, b"\x02\x28"),
    "no TLS": b"QEVM\x00\x00\x00\x03" + bytes(400),
}


# ---- how it begins ----


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("tls") / "tls.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, CEXT / "tls.c"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.rf_tls_client_says.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    loaded.rf_tls_server_says.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    loaded.rf_tls_wants.argtypes = (ctypes.c_char_p,)
    loaded.rf_tls_wants.restype = ctypes.c_size_t
    loaded.rf_tls_id.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    return loaded


def place(tls: ctypes.CDLL, client: list[bytes], server: list[bytes]) -> tuple[int, int, bytes]:
    """What is known by all that was said, how much of the server's was taken until then, and the id."""
    room, found = ctypes.create_string_buffer(8192), ctypes.create_string_buffer(16)
    for piece in client:
        tls.rf_tls_client_says(room, piece, len(piece))
    verdict, taken = BEFORE, 0
    for piece in server:
        at = 0
        while at < len(piece) and verdict == BEFORE:
            part = piece[at : at + tls.rf_tls_wants(room)]
            verdict = tls.rf_tls_server_says(room, part, len(part))
            at += len(part)
        taken += at
    if verdict == HERE:
        tls.rf_tls_id(room, found)
    return verdict, taken, found.raw


def session_id(client: bytes, server: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(client[27:43], server[27:43], strict=True))


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_the_handshakes_of_qemus_have_the_place(tls: ctypes.CDLL, kind: str) -> None:
    data = (CORPUS / kind).read_bytes()
    length = int.from_bytes(data[:2], "big")
    client, server = data[2 : 2 + length], data[2 + length :]
    end = 5 + int.from_bytes(server[3:5], "big")
    assert place(tls, [client], [server]) == (HERE, end + len(CCS), session_id(client, server))


@pytest.mark.parametrize("server", NO_PLACE.values(), ids=NO_PLACE.keys())
def test_others_have_none(tls: ctypes.CDLL, server: bytes) -> None:
    assert place(tls, [CLIENT], [server])[0] == NOWHERE
    assert place(tls, [CLIENT], chunks(server, range(len(server))))[0] == NOWHERE


@pytest.mark.parametrize(
    "client",
    [b"", CLIENT[:42], record(21, bytes(60)), hello(2, bytes(60))],
    ids=["nothing", "cut", "an alert", "a ServerHello"],
)
def test_nor_has_one_whose_client_said_no_hello(tls: ctypes.CDLL, client: bytes) -> None:
    assert place(tls, [client], [SERVER + CCS])[0] == NOWHERE


EXTENSIONS = st.builds(
    lambda kind, body: kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body,
    st.integers(0, 0xFFFF).filter(lambda kind: kind != 43),
    st.binary(max_size=80),
)


@settings(max_examples=25)
@given(
    st.lists(EXTENSIONS, max_size=3),
    st.lists(EXTENSIONS, max_size=3),
    st.binary(max_size=32),
    st.binary(min_size=32, max_size=32),
    st.binary(max_size=40),
    st.lists(st.integers(0, 1 << 30)),
)
def test_it_is_right_behind_for_any_chunking(
    tls: ctypes.CDLL,
    before: list[bytes],
    after: list[bytes],
    session: bytes,
    random: bytes,
    behind: bytes,
    cuts: list[int],
) -> None:
    client = client_hello(random[::-1])
    server = server_hello(*before, CHOSEN_1_3, *after, random=random, session=session)
    expected = HERE, len(server) + len(CCS), session_id(client, server)
    said = server + CCS + behind
    assert place(tls, chunks(client, cuts), chunks(said, cuts)) == expected
    assert place(tls, [client], [server, CCS[:3], CCS[3:]]) == expected


@settings(max_examples=50)
@given(st.integers(0, len(SERVER) + len(CCS) - 1), st.integers(1, 255))
def test_what_is_not_understood_has_none(tls: ctypes.CDLL, at: int, change: int) -> None:
    """Any byte may be another: the place is found where it was, or not at all."""
    said = bytearray(SERVER + CCS)
    said[at] ^= change
    verdict, taken, _ = place(tls, [CLIENT], [bytes(said)])
    assert verdict != HERE or taken == len(said)
    assert verdict != HERE or (at not in range(11) and at < len(SERVER))


# ---- between two relays ----


@pytest.mark.parametrize("cut", [0, 5, len(SERVER), len(SERVER) + 4, len(SERVER) + 6])
def test_it_is_offered_in_the_handshake_and_neither_qemu_sees_that(cut: int) -> None:
    with both(encrypted=True) as ends:
        ends.from_qemu.sendall(CLIENT)
        assert _exactly(ends.to_qemu, len(CLIENT)) == CLIENT
        said = SERVER + CCS + BEHIND
        ends.to_qemu.sendall(said[:cut])
        assert _exactly(ends.from_qemu, cut) == said[:cut]
        ends.to_qemu.sendall(said[cut:])
        assert _exactly(ends.from_qemu, len(said) - cut) == said[cut:]
        until(lambda: _state(ends.source) is SessionState.OFFERED, "no offer")
        views = ends.source.session(), ends.destination.session()
        assert {view.id for view in views if view} == {session_id(CLIENT, SERVER)}
        ends.plain[0].shutdown(socket.SHUT_RDWR)
        until(lambda: _state(ends.source) is SessionState.BETWEEN, "no loss")
        until(lambda: _state(ends.destination) is SessionState.BETWEEN, "no loss")
        ends.from_qemu.sendall(BEHIND)
        ends.to_qemu.sendall(BEHIND[::-1])
        assert ends.join()
        assert _exactly(ends.to_qemu, len(BEHIND)) == BEHIND
        assert _exactly(ends.from_qemu, len(BEHIND)) == BEHIND[::-1]


@pytest.mark.parametrize("server", NO_PLACE.values(), ids=NO_PLACE.keys())
def test_nothing_is_offered_where_there_is_no_place(server: bytes) -> None:
    with both(encrypted=True) as ends:
        ends.from_qemu.sendall(CLIENT)
        assert _exactly(ends.to_qemu, len(CLIENT)) == CLIENT
        ends.to_qemu.sendall(server + BEHIND)
        assert _exactly(ends.from_qemu, len(server + BEHIND)) == server + BEHIND
        assert {_state(ends.source), _state(ends.destination)} == {SessionState.NONE}


def _offered_to(host: socket.socket, relay: Relay, qemu: socket.socket) -> bytes:
    """What a server's end says behind its ChangeCipherSpec to a client that is no refault."""
    host.settimeout(10)
    host.sendall(CLIENT)
    assert _exactly(qemu, len(CLIENT)) == CLIENT
    qemu.sendall(SERVER + CCS)
    assert _exactly(host, len(SERVER + CCS)) == SERVER + CCS
    assert _state(relay) is SessionState.PLAIN
    qemu.sendall(BEHIND)
    return _exactly(host, 2 * len(CCS) + len(BEHIND))


def test_a_bare_source_is_told_two_records_that_tls_drops() -> None:
    with one(Role.DESTINATION, SessionEnd.ANSWERS, encrypted=True) as (relay, qemu, host):
        assert _offered_to(host, relay, qemu) == 2 * CCS + BEHIND


@pytest.mark.parametrize(
    "behind", [BEHIND, CCS + BEHIND, CCS + CCS[:5] + BEHIND, CCS[:1] + BEHIND], ids=["none", "one", "11", "1"]
)
def test_what_a_bare_destination_says_is_all_passed_on(behind: bytes) -> None:
    with one(Role.SOURCE, SessionEnd.DIALS, encrypted=True) as (relay, qemu, host):
        host.settimeout(10)
        qemu.sendall(CLIENT)
        assert _exactly(host, len(CLIENT)) == CLIENT
        for byte in SERVER + CCS + behind:
            host.sendall(bytes([byte]))
        assert _exactly(qemu, len(SERVER + CCS + behind)) == SERVER + CCS + behind
        assert _state(relay) is SessionState.NONE


def test_more_of_such_records_behind_the_offer_are_the_servers() -> None:
    with one(Role.SOURCE, SessionEnd.DIALS, encrypted=True) as (relay, qemu, host):
        host.settimeout(10)
        qemu.sendall(CLIENT)
        assert _exactly(host, len(CLIENT)) == CLIENT
        host.sendall(SERVER + CCS + 2 * CCS + CCS + BEHIND)
        assert _exactly(qemu, len(SERVER) + 2 * len(CCS) + len(BEHIND)) == SERVER + CCS + CCS + BEHIND
        assert _state(relay) is SessionState.OFFERED
