"""The shortest server: send back what comes.

    python examples/echo.py [ADDRESS], then: nc 127.0.0.1 5000

``recv`` and ``sendall`` block this handler only: each connection runs in a greenlet of its own. A stop of the server
waits for it until its client has left, 30 s at most; line_protocol.py shows how a client that waits is let go at once.
"""

from serve import serve

from gtcpserver import Connection


def echo(conn: Connection) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


if __name__ == "__main__":
    serve(echo)  # in a program of your own: gtcpserver.run(echo, "127.0.0.1:5000")
