"""What is known of another process."""

from __future__ import annotations

import os
import socket

import pytest

from refault.daemon.kernel.process import borrowed, holds, resident_pages, same_network


def test_this_process_is_in_its_own_network() -> None:
    assert same_network(os.getpid())


def test_a_process_that_is_gone_is_in_none() -> None:
    assert not same_network(2**22 + 1)


def test_who_holds_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inode = os.fstat(ours.fileno()).st_ino
        assert holds(os.getpid(), inode)
        with borrowed(os.getpid(), inode) as same:
            assert os.fstat(same.fileno()).st_ino == inode
    assert not holds(os.getpid(), inode)
    with pytest.raises(FileNotFoundError):
        borrowed(os.getpid(), inode)


def test_the_memory_of_this_process_is_there() -> None:
    assert resident_pages(os.getpid()) > 0
