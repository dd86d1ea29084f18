"""The course of a migration and of its recovery, without I/O: what QEMU reports in, what to tell QEMU out."""
