"""The operator, systemd and the journal. It knows no VM."""
