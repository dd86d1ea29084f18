"""Where refault keeps its sockets and its state."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from refault.daemon.host.errors import OperatorError

SUN_PATH = 108
"""sizeof(sockaddr_un.sun_path): a path has one byte less (man 7 unix), and so has an abstract name."""
CONTROL_SUFFIX = ".control"


def runtime_directory(environment: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The directory of control sockets.

    systemd's ``$RUNTIME_DIRECTORY`` (the first, where there are several), else /run/refault for root, else
    ``$XDG_RUNTIME_DIR/refault``.
    """
    if given := environment.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    uid = os.getuid() if uid is None else uid
    if uid == 0:
        return Path("/run/refault")
    return Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") / "refault"


def runtime_directories(environment: Mapping[str, str] = os.environ, uid: int | None = None) -> list[Path]:
    """Where daemons are looked for: our own runtime directory, and unless it was told, root's."""
    own = runtime_directory(environment, uid)
    common = [] if environment.get("RUNTIME_DIRECTORY") else [Path("/run/refault")]
    return list(dict.fromkeys([own, *common]))


def control_socket(name: str, environment: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The default control socket of the VM `name`."""
    directory = runtime_directory(environment, uid)
    return directory / short_name(directory, name, CONTROL_SUFFIX)


def short_name(directory: Path, name: str, suffix: str, behind: int = 0) -> str:
    """`name` and `suffix`, where a socket's path has room for them in `directory` and `behind` bytes more;
    else a digest in the name's place, by which it is found again.
    """
    room = SUN_PATH - 1 - len(os.fsencode(directory / suffix)) - behind
    if len(os.fsencode(name)) <= room:
        return f"{name}{suffix}"
    return f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}{suffix}"


def state_directory(environment: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The directory of state files: systemd's ``$STATE_DIRECTORY``, else the runtime directory, a tmpfs."""
    if given := environment.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    return runtime_directory(environment, uid)


def make_if_default(path: Path) -> None:
    """Makes `path` if it is the runtime directory and not there. Raises `OperatorError`."""
    if path == runtime_directory():
        make_default_directory(path)


def make_default_directory(path: Path) -> None:
    """Makes the runtime directory where no service manager has, with mode 0755 for root; for others, who may
    pass by its parent may pass.

    Raises `OperatorError`.
    """
    if os.path.isdir(path):
        return
    try:
        mode = _mode(path)
        path.mkdir(mode=mode)
        path.chmod(mode)  # whatever the umask
    except FileExistsError:
        return
    except OSError as error:
        raise OperatorError(
            f"cannot make {path}: {error.strerror}; make it, or name --control and --state-dir"
        ) from error


def _mode(path: Path) -> int:
    """Who may pass by what it lies in may pass here: QEMU may be another user's. Raises OSError."""
    return 0o755 if os.getuid() == 0 else 0o700 | path.parent.stat().st_mode & 0o055


def must_be_writable(path: Path) -> None:
    """Raises `OperatorError` where no file can be made in the directory `path`."""
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OperatorError(
            f"cannot keep state in {path}: {error.strerror}; make it a directory that uid {os.geteuid()} can"
            " write to, or name another with --state-dir"
        ) from error


def make_again(path: Path) -> None:
    """Makes a directory of refault's that has gone away while it ran, as it was made, where that can be done.

    Raises nothing: whoever needs it hears of it.
    """
    if not os.path.exists(path):
        with contextlib.suppress(OSError):
            mode = _mode(path)
            path.mkdir(mode=mode)
            path.chmod(mode)
