"""Two names on one port, each with its own certificate, and answers by name (SNI, RFC 6066 section 3).

    python examples/sni.py [ADDRESS], then: curl -k --resolve one.example:5000:127.0.0.1 https://one.example:5000/

Clients that ask for other names, or none, get the certificate of localhost.
"""

import sys

from gtcpserver import Connection, EarlyEOF, TLSConfig, run
from gtcpserver.tls import self_signed

SITES = {"one.example": b"This is one.\n", "two.example": b"This is two.\n"}


def handle(conn: Connection) -> None:
    conn.settimeout(30)
    try:
        conn.recv_until(b"\r\n\r\n")
    except EarlyEOF:
        return
    assert conn.tls is not None
    body = SITES.get(conn.tls.server_name or "", b"Nobody here by that name.\n")
    conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body))


if __name__ == "__main__":
    tls = TLSConfig(*self_signed(), sni={name: self_signed([name]) for name in SITES})
    run(handle, *sys.argv[1:], tls=tls)
