"""The lab's guest as a libvirt domain, its memory, and what libvirt tells of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.libvirt.hosts import EMULATORS, SECOND_MONITOR, SHARED, LibvirtHost
from tests.support.until import until

from refault.lab.guest import PAGE, STATE_BASE, Guest, Progress
from refault.lab.qemu import accelerator

NAME = "vm"
UUID = "6b6f2a1e-7a55-4c5e-9d0f-2f6b8d2a9c01"
GUEST = Guest(vcpus=2, log_pages=14, tick_ns=250_000)
_DISK = """
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{file}'/>
      <target dev='vda' bus='virtio'/></disk>"""
_SECOND = f"""
  <qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{SECOND_MONITOR},server=on,wait=off'/>
  </qemu:commandline>"""
_XML = """<domain type='{kind}'><name>{name}</name><uuid>{uuid}</uuid>
  <memory unit='b'>{ram}</memory><vcpu>{vcpus}</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom'>{shared}/guest.bin</loader></os>
  <features><acpi/><apic/></features><on_crash>destroy</on_crash>
  <devices><emulator>{emulator}</emulator>{disk}
    <memballoon model='none'/><controller type='usb' model='none'/></devices>{second}</domain>"""
_MARKER = """<domain type='qemu'><name>marker</name><uuid>6b6f2a1e-7a55-4c5e-9d0f-2f6b8d2a9c02</uuid>
  <memory>1024</memory><os><type>hvm</type></os></domain>"""


def xml(variant: str, *, disk: bool = False, name: str = NAME) -> str:
    """The domain, with an emulator of EMULATORS."""
    return _XML.format(
        name=name,
        kind="kvm" if accelerator() == "kvm" else "qemu",
        uuid=UUID,
        ram=GUEST.ram_bytes,
        vcpus=GUEST.vcpus,
        shared=SHARED,
        emulator=EMULATORS[variant],
        disk=_DISK.format(file=f"{SHARED}/disk.raw") if disk else "",
        second=_SECOND if variant == "second" else "",
    )


def prepare(host: LibvirtHost, variant: str) -> None:
    """Lays what the domain needs; refault is one that does what the variant says."""
    wanted = "refault" if variant == "bare" else variant
    if host.refault != wanted:
        host.kill("refault")
        host.start_refault(wanted)
    (host.files / "guest.bin").write_bytes(GUEST.firmware())
    with (host.files / "disk.raw").open("wb") as disk:
        disk.truncate(8 << 20)


def file(host: LibvirtHost, name: str, content: str) -> str:
    """A file of the host's, as its programs name it."""
    (host.files / name).write_text(content)
    return f"{SHARED}/{name}"


def states(host: LibvirtHost) -> tuple[Progress, ...]:
    """How far each vCPU has come. Raises AssertionError where QEMU does not say."""
    data = _dump(host, STATE_BASE, GUEST.vcpus * PAGE)
    return tuple(Progress.parse(data[vcpu * PAGE :]) for vcpu in range(GUEST.vcpus))


def _dump(host: LibvirtHost, address: int, length: int) -> bytes:
    arguments = {"val": address, "size": length, "filename": f"{SHARED}/written/memory"}
    command = json.dumps({"execute": "pmemsave", "arguments": arguments})
    host.must("qemu-monitor-command", NAME, command)
    path = host.files / "written" / "memory"
    data = path.read_bytes()
    path.unlink()
    return data


def wait_guest(host: LibvirtHost, sweep: int = 1) -> None:
    """Until each vCPU has written all its pages so often."""
    seen: list[tuple[Progress, ...]] = []

    def has() -> bool:
        seen.append(states(host))
        return all(each.sweep > sweep for each in seen[-1])

    until(has, lambda: seen[-1], seconds=60, pause=0.05)


def check_memory(host: LibvirtHost) -> str:
    """What is wrong with a domain's memory, or that its guest stands still; nothing where both are right.

    It is suspended then."""
    before = states(host)
    goes_on = lambda: all(now > then for now, then in zip(states(host), before, strict=True))  # noqa: E731
    try:
        until(goes_on, lambda: before, pause=0.05)
    except AssertionError:
        return "the guest stands still"
    host.must("suspend", NAME)
    progress = states(host)
    wrong = [
        mismatch
        for vcpu in range(GUEST.vcpus)
        for mismatch in GUEST.check_arena(
            vcpu, progress[vcpu], _dump(host, GUEST.arena(vcpu), GUEST.arena_bytes)
        )
    ]
    return f"{len(wrong)} pages wrong, {wrong[0]}" if wrong else ""


@dataclass
class Events:
    """What libvirtd tells whoever asks for all events, from the last `seen` on."""

    host: LibvirtHost
    _read: int

    @classmethod
    def listen(cls, host: LibvirtHost) -> Events:
        """Begins."""
        host.must("define", file(host, "marker.xml", _MARKER))
        read = len(host.said("events").splitlines())
        listens = ("stdbuf", "-oL", "virsh", "-c", "qemu:///system", "event", "--all", "--loop")
        host.start("events", *host.in_suite(*listens))
        events = cls(host, read)
        until(events._hears, lambda: host.said("events"), pause=0.1)
        events.seen()
        return events

    def _mark(self) -> None:
        marker = ("--uri", "urn:refault:lab", "--key", "lab", "--set", "<mark/>")
        self.host.must("metadata", "marker", "--config", *marker)

    def _hears(self) -> bool:
        self._mark()
        return self._marked()

    def _lines(self) -> list[str]:
        return self.host.said("events").splitlines()[self._read :]

    def _marked(self) -> bool:
        return any("'marker'" in line for line in self._lines())

    def close(self) -> None:
        """Listens no more."""
        self.host.kill("events")

    def seen(self) -> list[str]:
        """Those since the last call, up to now."""
        self._mark()
        until(self._marked, lambda: self._lines(), pause=0.01)
        lines = self._lines()
        self._read += len(lines)
        return [line for line in lines if f"'{NAME}'" in line]


def remove(host: LibvirtHost) -> None:
    """Leaves nothing of the domain."""
    host.virsh("destroy", NAME)
    host.virsh("managedsave-remove", NAME)
    for line in host.virsh("snapshot-list", NAME, "--name").output.split():
        host.virsh("snapshot-delete", NAME, line, "--metadata")
    host.virsh("undefine", NAME)


def lines_without_numbers(text: str) -> Iterator[str]:
    """For comparison: times, counts and descriptors differ from run to run."""
    for line in sorted(text.splitlines()):  # domstats comes in any order
        yield re.sub("[0-9]+", "N", line)
