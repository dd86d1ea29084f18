"""The pump where the kernel, or the C library, has no memory for it, and who frees what it has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

FREES_ITS_RECORDS_ITSELF = """
import ctypes
from refault.channel._channel import lib
from refault.channel.relay import Relay
from refault.migration.phase import Role

relay = Relay(Role.SOURCE)
records = lib.rf_tracker_pagemap(lib.rf_relay_tracker(relay._relay))
for page in range(64 * 256):
    assert lib.rf_pagemap_request(records, b"pc.ram", 6, page * 4096, 4096, 1) == 0
freed = ctypes.CDLL(None).chunks_freed_by_main
before = freed()
relay.close()
assert freed() - before < 8, f"the event loop has freed {freed() - before} chunks of records"
"""

PASSES_ALL_THE_SAME = """
import errno, os, socket, time
from refault.channel.relay import Lane, Relay
from refault.migration.phase import Role
from tests.unit.channel.test_relay import bytes_pass_both_ways, relaying, tcp_pair

with relaying(Role.SOURCE) as ends:
    ends.channel(lanes=1)
    bytes_pass_both_ways(ends.qemu, ends.host)
    spent = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - spent < 0.1, "the pump spins"
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    kept = local.dup()
    before = len(os.listdir("/proc/self/fd"))
    try:
        ends.relay.add_lane(1, Lane.PREEMPT, local.detach(), far.detach())
    except OSError as error:
        assert error.errno == errno.ENOMEM, error
    else:
        raise AssertionError("a lane without memory was taken")
    assert len(os.listdir("/proc/self/fd")) == before - 2, "descriptors stay"
    ends.relay.lose(1, errno.ENOMEM)
    ends.until(lambda view: view.far.lost)
    for end in (qemu, host, kept):
        end.close()
"""


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    library = tmp_path_factory.mktemp("preloaded") / "no_memory.so"
    subprocess.run(
        ["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", library, HERE / "no_memory.c"], check=True
    )
    return os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parents[2])}


def test_a_pump_without_memory_neither_stops_nor_spins(preloaded: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", PASSES_ALL_THE_SAME], check=True, env=preloaded, timeout=60)


def test_millions_of_records_are_not_freed_on_the_event_loop(preloaded: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", FREES_ITS_RECORDS_ITSELF], check=True, env=preloaded, timeout=60)
