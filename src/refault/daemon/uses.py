"""What each address is used for: no two uses share one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from refault.daemon.monitor.address import Address, host_port, place_of
from refault.daemon.options import VmOptions
from refault.migration.endpoint import Inet, parse_uri


@dataclass(frozen=True)
class Use:
    """An address in the place of an option."""

    owner: str
    """The VM, or who else has it."""
    option: str
    """By its name in files."""
    written: str
    place: tuple[object, ...]


def of_vm(owner: str, vm: VmOptions) -> list[Use]:
    """The uses that one VM makes of addresses."""
    uses = [Use(owner, "qemu", str(vm.qemu), vm.qemu.place)]
    uses += [Use(owner, "listen", str(address), address.place) for address in vm.listen]
    if vm.incoming is not None:
        endpoint, path = vm.incoming
        uses.append(Use(owner, "incoming", f"unix:{path}", place_of(path)))
        uses.append(Use(owner, "incoming", endpoint.uri, Address(None, endpoint.host, endpoint.port).place))
    for uri in vm.recover_uris:
        recovered = parse_uri(uri)
        if isinstance(recovered, Inet):
            place = Address(None, recovered.host, recovered.port).place
            uses.append(Use(owner, "recover_uri", uri, place))
    return uses


def of_control(owner: str, control: Address) -> Use:
    """The control socket's."""
    return Use(owner, "control", str(control.path), control.place)


def of_exec(owner: str, where: Address) -> Use:
    """Of where monitors are handed over."""
    return Use(owner, "exec", str(where.path), where.place)


def of_metrics(owner: str, metrics: Address) -> Use:
    """The metrics'."""
    written = host_port(metrics.host, metrics.port) if metrics.path is None else str(metrics)
    return Use(owner, "metrics", written, metrics.place)


def clashes(uses: Iterable[Use]) -> Iterator[tuple[Use, Use]]:
    """Pairs that share an address: the later one, and the first that has it.

    A migration may come to one VM at an address of several options: that is one address.
    """
    taken: dict[tuple[object, ...], Use] = {}
    for use in uses:
        if use.place[0] == "tcp" and use.place[-1] == 0:
            continue  # the kernel chooses another port for each
        first = taken.setdefault(use.place, use)
        if first is not use and not (first.owner == use.owner and {first.option, use.option} <= _MIGRATION):
            yield use, first


_MIGRATION = {"incoming", "recover_uri"}
