"""TCP to the other host, until it is joined. It knows no QEMU."""
