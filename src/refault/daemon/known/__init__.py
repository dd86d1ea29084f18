"""What is known of a VM, for those who act on it."""
