"""The pump where the kernel, or the C library, has no memory for it."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

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


def test_a_pump_without_memory_neither_stops_nor_spins(tmp_path: Path) -> None:
    library = tmp_path / "no_memory.so"
    subprocess.run(
        ["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", library, HERE / "no_memory.c"], check=True
    )
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parents[2])}
    subprocess.run([sys.executable, "-c", PASSES_ALL_THE_SAME], check=True, env=environment, timeout=60)
