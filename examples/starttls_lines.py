"""A line protocol that begins in plain text and switches to TLS on request, as SMTP and IMAP do.

    python examples/starttls_lines.py [ADDRESS [CERTFILE [KEYFILE]]]

    openssl s_client -quiet -starttls smtp -connect 127.0.0.1:5000

Requests: ``EHLO name``, ``STARTTLS``, ``NOTE text`` (only encrypted), ``QUIT``. Answers are as in SMTP (RFC 5321).
"""

import sys

from gtcpserver import Connection, EarlyEOF, LimitExceeded, StartTLSError, TLSConfig, run
from gtcpserver.tls import self_signed

LONGEST_LINE = 512  # RFC 5321 section 4.5.3.1.4


def handle(conn: Connection) -> None:
    conn.settimeout(300)  # RFC 5321 section 4.5.3.2.7
    conn.sendall(b"220 notes ready\r\n")
    try:
        while answer(conn, conn.recv_until(b"\n", LONGEST_LINE).strip()):
            pass
    except EarlyEOF:
        pass  # the client has closed
    except LimitExceeded:
        conn.sendall(b"500 line too long\r\n")
    except StartTLSError:
        # Plain-text commands followed STARTTLS. An attacker who injected them must not be taken for the encrypted
        # client.
        conn.sendall(b"554 nothing may follow STARTTLS\r\n")


def answer(conn: Connection, line: bytes) -> bool:
    """Serve one request; return False to end the connection."""
    verb, _, text = line.partition(b" ")
    match verb.upper():
        case b"EHLO":
            conn.sendall(b"250 notes\r\n" if conn.tls is not None else b"250-notes\r\n250 STARTTLS\r\n")
        case b"STARTTLS" if conn.tls is None:
            conn.sendall(b"220 go ahead\r\n")
            conn.start_tls(conn.context)
            # What the client said before no longer counts (RFC 3207 section 4.2): here there is nothing.
        case b"STARTTLS":
            conn.sendall(b"503 encrypted already\r\n")
        case b"NOTE" if conn.tls is None:
            conn.sendall(b"530 STARTTLS first\r\n")
        case b"NOTE":
            conn.sendall(b"250 noted %d bytes\r\n" % len(text))
        case b"QUIT":
            conn.sendall(b"221 bye\r\n")
            return False
        case _:
            conn.sendall(b"500 expected EHLO, STARTTLS, NOTE or QUIT\r\n")
    return True


if __name__ == "__main__":
    address, *files = sys.argv[1:] or ["127.0.0.1:5000"]
    # Not as tls=...: the handler begins in plain text, and gets it as conn.context.
    run(handle, address, context=TLSConfig(*(files or self_signed())))
