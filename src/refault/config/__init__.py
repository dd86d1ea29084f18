"""What an operator says: the options of a VM and of the daemon, on a command line or in files."""
