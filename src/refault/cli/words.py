"""Numbers and names as people read them on a terminal."""

from __future__ import annotations

import grp
import pwd


def printable(line: str) -> str:
    """Keeps what a guest or a peer put into a name or an error from steering the terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


def user_name(uid: int) -> str:
    """By name, where this host knows one."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """By name, where this host knows one."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def seconds(value: float | None) -> str:
    """Three digits; a dash for what is not known."""
    return "-" if value is None else f"{value:.3g} s"


def size(count: int) -> str:
    """Binary units, exact where the number is round: 4 KiB, 1.5 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
