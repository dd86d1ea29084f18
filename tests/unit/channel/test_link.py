"""The memory of a link (cext/link.c), reached past the pump."""

import ctypes
import subprocess
from pathlib import Path

import pytest

CEXT = Path(__file__).parents[3] / "cext"
MIGRATION_RINGS = 64 << 20


class Rings(ctypes.Structure):
    """struct rf_rings"""

    _fields_ = (("used", ctypes.c_size_t), ("scratch", ctypes.c_void_p))


class Place(ctypes.Structure):
    """struct rf_link_place"""

    _fields_ = (("channel", ctypes.c_uint64), ("lane", ctypes.c_uint), ("lanes", ctypes.c_uint))


GROWS = """
#include "link.h"

/* What is taken of `rings` when one is full, the leg has more, and the peer has room. */
size_t used_with_more_to_say(struct rf_rings *rings) {
    struct rf_link *link = rf_link_new(false, NULL, (struct rf_link_place){1, 0, 1}, rings);
    struct rf_positions peer = {.window = 1 << 30};
    struct pollfd one;
    uint8_t *at;
    size_t space, used;

    while ((space = rf_stream_space(link->stream, &at)) > 0) {
        rf_stream_put(link->stream, space);
    }
    rf_stream_resume(link->stream, &peer);
    link->leg_writes = true;
    rf_link_want(link, &one);
    used = rings->used;
    rf_link_free(link);
    return used;
}
"""


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("link")
    library, grows = directory / "link.so", directory / "grows.c"
    grows.write_text(GROWS)
    sources = [*(CEXT / f"{part}.c" for part in ("link", "session", "tls", "tcp", "queues")), grows]
    options = ["-D_GNU_SOURCE", "-shared", "-fPIC", f"-I{CEXT}", "-o", str(library)]
    subprocess.run(["cc", *options, *sources], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.used_with_more_to_say.restype = ctypes.c_size_t
    loaded.rf_link_new.restype = ctypes.c_void_p
    loaded.rf_link_new.argtypes = (ctypes.c_bool, ctypes.c_void_p, Place, ctypes.c_void_p)
    loaded.rf_link_free.argtypes = (ctypes.c_void_p,)
    return loaded


@pytest.mark.parametrize(
    ("left", "taken"),
    [(2 << 20, 2 << 20), ((2 << 20) - 1, 1 << 20), (128 << 10, 128 << 10), ((128 << 10) - 1, 0)],
)
def test_the_rings_are_as_large_as_there_is_room_for(link: ctypes.CDLL, left: int, taken: int) -> None:
    rings = Rings(MIGRATION_RINGS - left, None)
    made = link.rf_link_new(False, None, Place(1, 0, 1), ctypes.byref(rings))
    assert rings.used == MIGRATION_RINGS - left + taken
    assert bool(made) == bool(taken)
    link.rf_link_free(made)
    assert rings.used == MIGRATION_RINGS - left
    ctypes.CDLL(None).free(ctypes.c_void_p(rings.scratch))


@pytest.mark.parametrize(("left", "grows"), [(4 << 20, True), ((4 << 20) - 1, False)])
def test_a_ring_grows_where_the_old_one_and_the_new_have_room_at_once(
    link: ctypes.CDLL, left: int, grows: bool
) -> None:
    rings = Rings(MIGRATION_RINGS - left, None)
    used = link.used_with_more_to_say(ctypes.byref(rings))
    assert used == MIGRATION_RINGS - left + ((3 << 20) if grows else (2 << 20))
    assert rings.used == MIGRATION_RINGS - left
    ctypes.CDLL(None).free(ctypes.c_void_p(rings.scratch))


@pytest.mark.parametrize("lanes", [1, 2, 17, 256])
def test_all_lanes_of_a_channel_can_begin(link: ctypes.CDLL, lanes: int) -> None:
    rings = Rings(0, None)
    made = [
        link.rf_link_new(False, None, Place(1, lane, lanes), ctypes.byref(rings)) for lane in range(lanes)
    ]
    assert all(made)
    assert rings.used % lanes == 0
    for each in made:
        link.rf_link_free(each)
    assert rings.used == 0
    ctypes.CDLL(None).free(ctypes.c_void_p(rings.scratch))
