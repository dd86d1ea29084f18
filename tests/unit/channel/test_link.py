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


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("link") / "link.so"
    sources = [CEXT / f"{part}.c" for part in ("link", "session", "tcp", "queues")]
    subprocess.run(["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", library, *sources], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.rf_link_new.restype = ctypes.c_void_p
    loaded.rf_link_free.argtypes = (ctypes.c_void_p,)
    return loaded


@pytest.mark.parametrize(
    ("left", "taken"),
    [(2 << 20, 2 << 20), ((2 << 20) - 1, 1 << 20), (128 << 10, 128 << 10), ((128 << 10) - 1, 0)],
)
def test_the_rings_are_as_large_as_there_is_room_for(link: ctypes.CDLL, left: int, taken: int) -> None:
    rings = Rings(MIGRATION_RINGS - left, None)
    made = link.rf_link_new(False, None, ctypes.byref(rings))
    assert rings.used == MIGRATION_RINGS - left + taken
    assert bool(made) == bool(taken)
    link.rf_link_free(made)
    assert rings.used == MIGRATION_RINGS - left
    ctypes.CDLL(None).free(ctypes.c_void_p(rings.scratch))
