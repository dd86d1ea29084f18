"""What of our connections outlives refault: kept by QEMU, written down, and taken over by the next one."""
