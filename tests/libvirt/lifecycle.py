"""What libvirt does with a domain that stays where it is, command by command."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.libvirt.domains import NAME, Events, file, lines_without_numbers, prepare, remove, wait_guest, xml
from tests.libvirt.hosts import SHARED, LibvirtHost, Result

NIC = (
    "<interface type='ethernet'><target dev='lab0'/><mac address='52:54:00:00:00:01'/>"
    "<model type='virtio'/></interface>"
)
DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
    f"<source file='{SHARED}/second.raw'/><target dev='vdb' bus='virtio'/></disk>"
)
STEPS: tuple[tuple[str, ...], ...] = (
    ("define", "{xml}"),
    ("start", NAME),
    ("domstate", NAME, "--reason"),
    ("domstats", NAME),
    ("qemu-monitor-command", NAME, '{"execute":"query-status"}'),
    ("suspend", NAME),
    ("domstate", NAME, "--reason"),
    ("resume", NAME),
    ("attach-device", NAME, "{nic}", "--live"),
    ("domiflist", NAME),
    ("attach-device", NAME, "{disk}", "--live"),
    ("domblklist", NAME),
    ("domblkinfo", NAME, "vdb"),
    (
        "snapshot-create-as",
        NAME,
        "first",
        "--disk-only",
        "--diskspec",
        f"vda,file={SHARED}/overlay.qcow2",
        "--diskspec",
        "vdb,snapshot=no",
    ),
    ("blockcommit", NAME, "vda", "--active", "--pivot", "--wait"),
    ("domblklist", NAME),
    ("domjobinfo", NAME),
    ("save", NAME, f"{SHARED}/saved"),
    ("domstate", NAME, "--reason"),
    ("restore", f"{SHARED}/saved"),
    ("domstate", NAME, "--reason"),
    ("reset", NAME),
    ("libvirtd restarted",),
    ("domstate", NAME, "--reason"),
    ("domstats", NAME),
    ("libvirtd killed",),
    ("domstate", NAME, "--reason"),
    ("suspend", NAME),
    ("resume", NAME),
    ("shutdown", NAME),
    ("domstate", NAME, "--reason"),
    ("destroy", NAME),
    ("domstate", NAME, "--reason"),
    ("start", NAME, "--paused"),
    ("domstate", NAME, "--reason"),
    ("destroy", NAME, "--graceful"),
    ("undefine", NAME),
    ("create", "{broken}"),
)
"""As virsh is given them; the rest by name."""
SHORT_STEPS = (
    ("define", "{xml}"),
    ("start", NAME),
    ("suspend", NAME),
    ("refault killed",),
    ("domstate", NAME, "--reason"),
    ("resume", NAME),
    ("attach-device", NAME, "{nic}", "--live"),
    ("shutdown", NAME),
    ("destroy", NAME),
)
"""The most telling of them, and one that befalls refault."""


@dataclass(frozen=True)
class Step:
    """One, and what came of it."""

    command: str
    result: Result
    events: tuple[str, ...]

    @property
    def said(self) -> tuple[object, ...]:
        """What virsh ended with, as it is to be with any emulator."""
        return (self.result.code, tuple(lines_without_numbers(self.result.text)))

    @property
    def comparable(self) -> tuple[object, ...]:
        """The same, and the events."""
        return (self.said, self.events)


def run(host: LibvirtHost, variant: str, wanted: Sequence[tuple[str, ...]] = STEPS) -> list[Step]:
    """All that is wanted, with an emulator."""
    prepare(host, variant)
    (host.files / "second.raw").write_bytes(bytes(1 << 20))
    (host.files / "overlay.qcow2").unlink(missing_ok=True)
    domain = xml(variant, disk=True)
    given = {
        "{xml}": file(host, "vm.xml", domain),
        "{nic}": file(host, "nic.xml", NIC),
        "{disk}": file(host, "disk.xml", DISK),
        "{broken}": file(
            host,
            "broken.xml",
            domain.replace("machine='pc'", "machine='pc' foo=''").replace(
                f"{SHARED}/guest.bin", f"{SHARED}/nothing"
            ),
        ),
    }
    events = Events.listen(host)
    steps = []
    next_refault = ThreadPoolExecutor(1)
    try:
        for step in wanted:
            if step == ("refault killed",):
                if variant == "refault":
                    host.until_fronted()
                    host.kill("refault", "KILL")
                    next_refault.submit(host.start_refault)
                continue
            if step[0].startswith("libvirtd"):
                events.close()
                host.kill("libvirtd", "TERM" if "restarted" in step[0] else "KILL")
                host.start_libvirtd()
                events = Events.listen(host)
                continue
            result = host.virsh(*(given.get(word, word) for word in step))
            if step[0] == "start":
                assert result.code == 0, (result.text, host.qemu_said(NAME))
                if "--paused" not in step:
                    wait_guest(host, 0)
            steps.append(Step(" ".join(step), result, tuple(events.seen())))
    finally:
        next_refault.shutdown()
        events.close()
        remove(host)
    return steps
