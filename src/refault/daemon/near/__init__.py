"""Descriptors between refault and its own QEMU: made, laid, kept, given back."""
