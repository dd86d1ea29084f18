"""TCP to the other host until it is joined, and the session. It knows no QEMU."""
