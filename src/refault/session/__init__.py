"""Sessions: byte streams that outlive their connections, without I/O or clock (docs/session.md)."""
