"""Builds the compiled parts through cffi in API mode.

What Python may see of a C file stands between ``/* cffi: begin */`` and ``/* cffi: end */`` in its header, so
each declaration exists once. Run as a script, this compiles in place under ``src/``.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_VISIBLE = re.compile(r"/\* cffi: begin \*/\n(.*?)/\* cffi: end \*/", re.DOTALL)


@dataclass(frozen=True)
class Module:
    """One extension module and its C files (in cext/, without suffix), in the order of their headers."""

    name: str
    parts: tuple[str, ...]

    def headers(self) -> list[str]:
        return [f"{part}.h" for part in self.parts]

    def sources(self) -> list[str]:
        return [str(HERE / f"{part}.c") for part in self.parts]  # cffi compiles elsewhere

    def cdef(self) -> str:
        texts = []
        for header in self.headers():
            texts += _VISIBLE.findall((HERE / header).read_text())
        return "\n".join(texts)


MODULES: tuple[Module, ...] = (
    Module("refault.qmp._splitter", ("json_splitter",)),
    Module("refault.daemon.kept._journal", ("journal",)),
    Module("refault.session._session", ("session",)),
    Module(
        "refault.channel._channel",
        (
            "status",
            "budget",
            "pool",
            "bitmap",
            "histogram",
            "forward",
            "forward_parts",
            "forward_ram",
            "forward_dirty_bitmap",
            "returnpath",
            "crash",
            "statefile",
            "records",
            "pagemap",
            "tracker",
            "ends",
            "tcp",
            "session",
            "tls",
            "link",
            "leg",
            "queues",
            "pipe",
            "lane",
            "replay",
            "handed",
            "channel",
            "order",
            "relay",
        ),
    ),
)

CFLAGS = ("-std=c11", "-O2", "-g", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter")


def ffibuilder(module: Module) -> FFI:
    """The cffi builder of one module."""
    builder = FFI()
    builder.cdef(module.cdef())
    builder.set_source(
        module.name,
        "\n".join(f'#include "{header}"' for header in module.headers()),
        sources=module.sources(),
        include_dirs=[str(HERE)],
        define_macros=[("_GNU_SOURCE", None)],
        extra_compile_args=[*CFLAGS, f"-ffile-prefix-map={ROOT}=."],
        extra_link_args=["-pthread"],
    )
    return builder


def compile_all() -> list[Path]:
    """Compiles every module; the libraries land under ``src/``, beside the Python that uses them."""
    os.chdir(ROOT)
    libraries = []
    for module in MODULES:
        built = Path(ffibuilder(module).compile(tmpdir="build/cffi"))
        library = ROOT / "src" / Path(*module.name.split(".")[:-1]) / built.name
        library.unlink(missing_ok=True)  # a running process keeps the old one mapped
        shutil.copy2(built, library)
        libraries.append(library)
    return libraries


if __name__ == "__main__":
    for path in compile_all():
        print(path.relative_to(ROOT))
