"""NBD: every device of a store as a disk for any hypervisor, without FUSE and without a kernel module.

    from cowstore import nbd
    server = nbd.Server(store, [nbd.listen_unix("run/nbd.sock")])
    server.start()
    ...
    server.stop()

The protocol is bytes in, bytes out (``wire``, ``handshake``, ``requests``), under one thin shell of sockets and
threads (``channel``, ``listeners``, ``server``). It knows devices only by the small interfaces in ``exports``.
"""

from __future__ import annotations

from .certificates import tls_context
from .exports import Exports
from .handshake import CONTEXTS, Handshake, ProtocolError
from .limits import Limits
from .listeners import Listener, check_private, listen_tcp, listen_unix, make_private, passed
from .metrics import Counters, Metrics
from .requests import Request, Requests
from .server import Server

__all__ = [
    "CONTEXTS",
    "Counters",
    "Exports",
    "Handshake",
    "Limits",
    "Listener",
    "Metrics",
    "ProtocolError",
    "Request",
    "Requests",
    "Server",
    "check_private",
    "listen_tcp",
    "listen_unix",
    "make_private",
    "passed",
    "tls_context",
]
