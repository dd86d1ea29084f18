"""The only part that touches sockets, clocks, signals and systemd."""
