"""Send everything back, encrypted.

    python examples/tls_echo.py [ADDRESS [CERTFILE [KEYFILE]]], then: openssl s_client -quiet -connect 127.0.0.1:5000

Without files it creates a certificate for development, which clients have no reason to trust.
"""

import sys

from gtcpserver import Connection, TLSConfig, run
from gtcpserver.tls import self_signed


def echo(conn: Connection) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


if __name__ == "__main__":
    address, *files = sys.argv[1:] or ["127.0.0.1:5000"]
    run(echo, address, tls=TLSConfig(*(files or self_signed())))
