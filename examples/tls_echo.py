"""Sends back what it gets, encrypted.

    python examples/tls_echo.py, then: openssl s_client -quiet -connect 127.0.0.1:5000

    python examples/tls_echo.py 127.0.0.1:5000 CERTFILE [KEYFILE]

Without files it makes a certificate for development, which clients have no reason to trust.
"""

from serve_tls import serve_tls

from gtcpserver import Connection, TLSConfig
from gtcpserver.tls import self_signed


def echo(conn: Connection) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


def config(files: list[str]) -> TLSConfig:
    return TLSConfig(*(files or self_signed()))


if __name__ == "__main__":
    serve_tls(echo, config, "[CERTFILE [KEYFILE]]", files=(0, 1, 2))
