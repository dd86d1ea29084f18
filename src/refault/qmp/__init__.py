"""QMP, without I/O: bytes and events in, bytes and actions out."""
