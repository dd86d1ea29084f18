"""What the tracker of a migration's channel tells (cext/tracker.h) and keeps (cext/statefile.h)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from refault.channel._channel import lib


class Fact(enum.IntFlag):
    """What has passed; cext/tracker.h explains each."""

    POSTCOPY_DISCARD_SEEN = lib.RF_FACT_POSTCOPY_DISCARD_SEEN
    PACKAGED_BEGUN = lib.RF_FACT_PACKAGED_BEGUN
    PACKAGED_PASSED = lib.RF_FACT_PACKAGED_PASSED
    PONG_3 = lib.RF_FACT_PONG_3
    EOF_PASSED = lib.RF_FACT_EOF_PASSED
    SHUT_PASSED = lib.RF_FACT_SHUT_PASSED
    RECV_BITMAP_ASKED = lib.RF_FACT_RECV_BITMAP_ASKED
    RESUME_SENT = lib.RF_FACT_RESUME_SENT
    RESUME_ACK_PASSED = lib.RF_FACT_RESUME_ACK_PASSED
    RAM_DECLARED = lib.RF_FACT_RAM_DECLARED
    FOREIGN_PAGES = lib.RF_FACT_FOREIGN_PAGES
    IGNORE_SHARED = lib.RF_FACT_IGNORE_SHARED
    MULTIFD = lib.RF_FACT_MULTIFD
    COMPLETION_BEGUN = lib.RF_FACT_COMPLETION_BEGUN
    WHOLE_STREAM_SEEN = lib.RF_FACT_WHOLE_STREAM_SEEN
    HOST_PAGE_BEGUN = lib.RF_FACT_HOST_PAGE_BEGUN
    HOST_PAGE_CUT = lib.RF_FACT_HOST_PAGE_CUT


class Restored(enum.IntEnum):
    """What a tracker found in the state file of the refault before; cext/statefile.h explains each."""

    NOTHING = lib.RF_RESTORED_NOTHING
    WHOLE = lib.RF_RESTORED_WHOLE
    CRASHED = lib.RF_RESTORED_CRASHED
    TORN = lib.RF_RESTORED_TORN
    VERSION = lib.RF_RESTORED_VERSION
    FOREIGN = lib.RF_RESTORED_FOREIGN
    NO_MEMORY = lib.RF_RESTORED_NO_MEMORY


class Kept(enum.IntEnum):
    """How much of the page map is in the state file."""

    NOTHING = lib.RF_KEPT_NOTHING
    ALL = lib.RF_KEPT_ALL
    PART = lib.RF_KEPT_PART


@dataclass(frozen=True)
class StateFds:
    """The state file of one migration's tracking (cext/statefile.h): descriptors that stay the caller's."""

    new: int
    """Of the empty file that is written from now on."""
    key: bytes
    """Names the VM, the QEMU process and the migration; at most 512 bytes."""
    old: int = -1
    """Of the file that an earlier refault left of this migration; -1 for none."""
