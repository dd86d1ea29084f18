"""refault: recovers QEMU postcopy live migrations by itself, in front of QMP."""

__version__ = "0.1.0"
