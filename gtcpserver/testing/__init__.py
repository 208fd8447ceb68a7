"""Helpers for testing handlers: servers, clients, certificates, and clients that misbehave.

    with serving(handle) as server, connect(server) as client:
        client.sendall(b"GET name\\n")
        assert client.recv_until(b"\\n") == b"NONE\\n"

    report = check_faults(handle, [(b"GET name\\n", b"NONE\\n")])
    assert report.ok, report

Works with and without pytest, with and without monkey patching. If pytest is installed, ``pytest_gtcpserver`` provides
fixtures: gtcp_serve, gtcp_connect, gtcp_tls, gtcp_in_thread.
"""

from .certificates import Certificates, certificates
from .check import check_faults
from .client import Client, connect, in_thread
from .faults import FAULTS
from .report import FaultReport, Problem
from .serving import HandlerFailed, ServerUnderTest, serving

__all__ = [
    "FAULTS",
    "Certificates",
    "Client",
    "FaultReport",
    "HandlerFailed",
    "Problem",
    "ServerUnderTest",
    "certificates",
    "check_faults",
    "connect",
    "in_thread",
    "serving",
]
