"""`refault tunnel`: sessions for anybody. It knows no QMP and no QEMU."""
