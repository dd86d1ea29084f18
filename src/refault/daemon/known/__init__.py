"""What is known of a VM and of its migration, for those who act on it."""
