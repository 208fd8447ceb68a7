"""What origins behind the proxy answer, and an HTTP client of it."""

from __future__ import annotations

from kit.proxying import answer_of

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

CLOSE = object()


class Client:
    """A plain client; what it does runs in a native thread."""

    def __init__(self, sock, in_thread):
        self.sock = sock
        self.file = sock.makefile("rb")
        self.in_thread = in_thread

    def send(self, text, body=b""):
        self.in_thread(self.sock.sendall, (text.encode("latin-1") if isinstance(text, str) else text) + body)

    def get(self, url, *fields, method="GET", body=b""):
        self.send("\r\n".join([f"{method} {url} HTTP/1.1", "Host: x", *fields, "", ""]), body)
        return self.answer(method)

    def answer(self, method="GET"):
        return self.in_thread(answer_of, self.file, method)

    def read(self):
        """What comes until the end."""
        return self.in_thread(self.file.read)
