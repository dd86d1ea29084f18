"""What is made of a VM that libvirt's emulator hands over."""

from __future__ import annotations

from pathlib import Path

import pytest

from refault.config import values
from refault.config.hand_over import Handed
from refault.daemon.monitor.address import Address


@pytest.mark.parametrize(
    ("options", "seconds"),
    [("", 30.0), (",allow-user=root", 30.0), (",hide-pause=5", 5), (",hide-pause=0", 0)],
)
def test_pauses_are_hidden_from_libvirt_alone(options: str, seconds: float) -> None:
    handed = Handed(values.hand_over(f"/run/exec{options}"), (), Path("/run/vms"))
    libvirt, people = handed.vm("vm1", Address("/monitor", server=True, fd=7)).listen
    assert (libvirt.path, libvirt.fd, libvirt.rule.hide_pause) == ("/monitor", 7, seconds)
    assert not people.rule.hide_pause


@pytest.mark.parametrize("options", [",read-only=on", ",audit=on", ",deny=quit", ",wait=on"])
def test_no_other_rules_stand_there(options: str) -> None:
    with pytest.raises(ValueError, match="and hide-pause= alone"):
        values.hand_over(f"/run/exec{options}")


@pytest.mark.parametrize(
    ("name", "names"),
    [("vm1", ["vm1", "c0ffee"]), ("", ["c0ffee"]), ("a/b", ["c0ffee"]), ("x" * 65, ["c0ffee"])],
)
def test_where_the_domains_name_is_none_here_its_uuid_is(name: str, names: list[str]) -> None:
    handed = Handed(values.hand_over("/run/exec"), (), Path("/run/vms"))
    assert handed.names(name, "c0ffee") == names
    assert handed.names(name, "") == names[:-1]
