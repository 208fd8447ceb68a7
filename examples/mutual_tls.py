"""Only serve clients with a certificate, and greet them by the name in it.

    python examples/mutual_tls.py ADDRESS CLIENT_CA [CERTFILE [KEYFILE]]

    openssl s_client -quiet -connect 127.0.0.1:5000 -cert client.pem -key client.key

CLIENT_CA: a file with the certificate of the CA that issues client certificates. Without CERTFILE the server creates
its own certificate for development.
"""

import sys

from gtcpserver import Connection, TLSConfig, run
from gtcpserver.tls import self_signed


def handle(conn: Connection) -> None:
    assert conn.tls is not None
    certificate = conn.tls.peer_certificate
    assert certificate is not None  # client_auth="required"
    names = [value for part in certificate["subject"] for kind, value in part if kind == "commonName"]
    names += [value for _, value in certificate.get("subjectAltName", ())]
    conn.sendall(f"Hello {', '.join(names)}.\n".encode())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python mutual_tls.py ADDRESS CLIENT_CA [CERTFILE [KEYFILE]]")
    address, client_ca, *files = sys.argv[1:]
    run(handle, address, tls=TLSConfig(*(files or self_signed()), client_auth="required", client_ca=client_ca))
