"""QMP sockets: bytes to and from `refault.qmp`. It knows no migration."""
