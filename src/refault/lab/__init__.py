"""Pairs of real QEMUs with a guest whose memory can be checked, and a channel that can be broken."""
