"""refault installed for a Debian of another suite, with that one's own Python and compiler."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from tests.integration.debian import ENVIRONMENT, ROOT

# In a change root over what tests/tools/nspawn has made, in memory, seen by this process tree alone. There is
# no network.
_MAKE = """
mount -t tmpfs -o mode=755 tmpfs "$place"
cd "$place"
mkdir system system.changed system.work source.changed source.work
mount -t overlay overlay -o "lowerdir=$below,upperdir=$place/system.changed,workdir=$place/system.work" system
mkdir system/source system/layer system/wheels
mount -t overlay overlay -o "lowerdir=$checkout,upperdir=$place/source.changed,workdir=$place/source.work" \
    system/source
mount --bind "$layer" system/layer
mount --bind "$wheels" system/wheels
mount -t proc proc system/proc
mount --rbind /dev system/dev
rm -rf system/source/build
exec unshare --net chroot system \
    make -C /source install DESTDIR=/layer PREFIX=/usr/local PYTHON=/usr/bin/python3
"""


def install(base: Path, layer: Path) -> None:
    """`make install` of this checkout into `layer`, in the system at `base`."""
    python = ["chroot", str(base), "python3", "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
    version = subprocess.run(python, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    place, wheels = layer.parent / "place", layer.parent / "wheels"
    for directory in (layer, place, wheels):
        directory.mkdir()
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels)]
    download += ["--only-binary=:all:", "--python-version", version]
    subprocess.run([*download, *needed], check=True)
    words = {"place": place, "below": base, "checkout": ROOT, "layer": layer, "wheels": wheels}
    subprocess.run(
        ["unshare", "--mount", "sh", "-euc", _MAKE],
        env=ENVIRONMENT
        | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        | {name: str(word) for name, word in words.items()},
        umask=0o077,
        check=True,
    )
