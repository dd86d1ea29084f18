"""One frozen picture of all VMs, and who is shown it."""
