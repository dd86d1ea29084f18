"""Who dials, and who does not any more."""

import os
import socket

from refault.daemon.kernel.tcp import connects


def test_a_connection_that_comes_to_nothing_is_one_until_then() -> None:
    with socket.socket() as listener, socket.socket() as full, socket.socket() as dials:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        assert not connects(os.getpid(), port)
        full.connect(listener.getsockname())
        assert connects(os.getpid(), port)
        full.close()
        assert not connects(os.getpid(), port)
        # Nobody accepts and the queue is full, so that this one's SYN is not answered.
        dials.setblocking(False)
        dials.connect_ex(listener.getsockname())
        assert connects(os.getpid(), port)


def test_a_process_that_is_gone_dials_nothing() -> None:
    assert not connects(2**22 + 1, 1)
