"""Only clients with a certificate are served, and greeted by what is in it.

    python examples/mutual_tls.py 127.0.0.1:5000 CLIENT_CA [CERTFILE [KEYFILE]]

    openssl s_client -quiet -connect 127.0.0.1:5000 -cert client.pem -key client.key

CLIENT_CA: a file with the certificate of the CA that signs the clients'. Without CERTFILE the server makes a
certificate of its own for development.
"""

from serve_tls import serve_tls

from gtcpserver import Connection, TLSConfig
from gtcpserver.tls import self_signed


def handle(conn: Connection) -> None:
    assert conn.tls is not None
    certificate = conn.tls.peer_certificate
    assert certificate is not None  # client_auth="required"
    names = [value for part in certificate["subject"] for kind, value in part if kind == "commonName"]
    names += [value for _, value in certificate.get("subjectAltName", ())]
    conn.sendall(f"Hello {', '.join(names)}.\n".encode())


def config(files: list[str]) -> TLSConfig:
    return TLSConfig(*(files[1:] or self_signed()), client_auth="required", client_ca=files[0])


if __name__ == "__main__":
    serve_tls(handle, config, "CLIENT_CA [CERTFILE [KEYFILE]]", files=(1, 2, 3))
