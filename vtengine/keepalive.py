"""Socket options of a connection whose other end may vanish without a word: the system asks it for a sign of life."""

import socket

KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 8))
        if hasattr(socket, name)  # not on every system
    ),
]
"""(level, option, value): after a minute of silence eight questions, a quarter of a minute apart."""
