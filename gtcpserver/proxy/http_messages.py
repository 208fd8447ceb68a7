"""Requests to a proxy and its own answers (RFC 9110, RFC 9112). No I/O.

Forwarded messages are always rewritten; the original bytes are never copied. `gtcpserver.http1.head` parses the heads
of requests, h11 (`http_origin`) those of responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from gtcpserver.http1.head import Head, Header, HttpError

from .errors import BadTarget
from .target import Target, parse_authority

# -- targets -----------------------------------------------------------------------------------------------------------


def connect_target(head: Head) -> Target:
    """Return the destination of a CONNECT: host:port, with the port (RFC 9110 section 9.3.6). Raise HttpError."""
    try:
        return parse_authority(head.target.decode())
    except BadTarget as error:
        raise HttpError(400, f"CONNECT needs a host and a port: {error}.") from None


def absolute_target(head: Head) -> tuple[Target, bytes, bytes]:
    """Return the destination of any other request (RFC 9112 section 3.2.2).

    Returns:
        The destination; the value for Host, which is the authority of the target and not what the client put there; and
        the target for the origin.

    Raises:
        HttpError: not an absolute http URI.
    """
    scheme, found, rest = head.target.partition(b"://")
    if not found or head.target.startswith(b"/"):
        raise HttpError(400, "This is a proxy: it needs the whole address, such as http://example.com/.")
    if scheme.lower() != b"http":
        raise HttpError(400, "Only http addresses can be asked for in this way; https goes through CONNECT.")
    end = next((place for place, byte in enumerate(rest) if byte in b"/?#"), len(rest))
    authority, path = rest[:end], rest[end:].split(b"#", 1)[0]
    try:
        target = parse_authority(authority.decode(), 80)
    except BadTarget as error:
        raise HttpError(400, f"The address cannot be used: {error}.") from None
    if not path.startswith(b"/"):
        path = b"*" if head.method == b"OPTIONS" and not path else b"/" + path
    name = str(target).encode()
    return target, name.removesuffix(b":80"), path


# -- writing -----------------------------------------------------------------------------------------------------------


def head_of_answer(status: int, reason: bytes, headers: Sequence[Header]) -> bytes:
    """Return the head of a response to a client; the fields must have been parsed by us or by h11."""
    lines = [b"HTTP/1.1 %d %b" % (status, reason), *(b"%b: %b" % field for field in headers), b"\r\n"]
    return b"\r\n".join(lines)


def own_answer(
    status: int, body: bytes, headers: Sequence[Header] = (), *, close: bool, of_head: bool = False
) -> bytes:
    """Return a response of the proxy's own.

    Args:
        headers: more fields; without a Content-Type among them the body is text.
        close: no request may follow.
        of_head: the response to a HEAD, which has no body.
    """
    fields = list(headers)
    if not any(name == b"Content-Type" for name, _ in fields):
        fields.append((b"Content-Type", b"text/plain; charset=utf-8"))
    fields += [(b"Content-Length", b"%d" % len(body)), (b"Connection", b"close" if close else b"keep-alive")]
    return head_of_answer(status, HTTPStatus(status).phrase.encode(), fields) + (b"" if of_head else body)


def error_body(status: int, message: str) -> bytes:
    """Return the text of an error; it reveals nothing internal."""
    return f"{status} {HTTPStatus(status).phrase}\n\n{message}\n".encode()
