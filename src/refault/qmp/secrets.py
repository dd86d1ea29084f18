"""Which commands may have a secret in them, or in their reply: of these nothing is kept when they are over.

That is any whose arguments were not reviewed: passwords and keys stand in places without number (block
nodes' options and `json:` file names, chardevs, objects, keys that are pressed, a URI of `migrate`, the
`cpr-exec-command` of 11.1's migration parameters), and a later QEMU has more. Reviewed: the arguments in
query-qmp-schema of QEMU 5.2, 7.2, 10.0 and 11.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from refault.qmp.access import changes

_WITHOUT = frozenset(
    (
        b"add-fd",
        b"balloon",
        b"block-job-cancel",
        b"block-job-complete",
        b"block-job-set-speed",
        b"block_resize",
        b"block_set_io_throttle",
        b"blockdev-del",
        b"chardev-remove",
        b"closefd",
        b"cpu-add",
        b"device_del",
        b"getfd",
        b"job-cancel",
        b"job-complete",
        b"job-dismiss",
        b"job-finalize",
        b"migrate-continue",
        b"migrate-set-capabilities",
        b"netdev_del",
        b"object-del",
        b"qmp_capabilities",
        b"remove-fd",
        b"set_link",
    )
)
"""Of those that change something, the ones that are said often: names, numbers and switches alone."""


def may_have_secret(
    name: bytes, *, has_arguments: bool, arguments: Callable[[], Mapping[str, object]]
) -> bool:
    """`name`: empty of what is no command. `arguments` decodes them."""
    if name.startswith(b"query-") or name in _WITHOUT:
        return False
    if not name:
        return True
    return has_arguments and changes(name.decode(errors="replace"), arguments)
