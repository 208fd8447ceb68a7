"""The HTTP side of a monitor, as a WSGI application: metrics, health, JSON, and the status page."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent

from gtcpserver.process.clock import wall_time
from gtcpserver.strict_json import to_json

from . import metrics
from .history import GRAINS, SERIES, History, Slots
from .source import Fresh, Source, SourceError


def _page() -> bytes:
    """Put the page's style and scripts into it: one answer, without a reference to anything else."""
    folder = Path(__file__).with_name("page")
    page = (folder / "status.html").read_bytes()
    scripts = b"".join((folder / f"{name}.js").read_bytes() for name in SCRIPTS)
    return page.replace(b"/* style */", (folder / "status.css").read_bytes()).replace(b"/* scripts */", scripts)


#: In the order in which they are run: `figures` draws nothing, `live` asks for data and draws it.
SCRIPTS = ("figures", "history", "charts", "troubles", "tables", "live")

PAGE = _page()

#: Browsers request /favicon.ico on their own, also beside /metrics, and report a 404 as an error.
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="{}"/>'
    '<path d="M3 6h8L8.5 3.5M13 10H5l2.5 2.5" fill="none" stroke="#fff" stroke-width="2"/></svg>\n'
)

#: The page shows its state in its icon, too. The first is that of a page which has not heard yet.
ICONS = {
    "/favicon.ico": "#2a6fdb",
    "/icon-good.svg": "#1a7f4b",
    "/icon-warn.svg": "#b26a00",
    "/icon-bad.svg": "#c62f3b",
}

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
FLOATS = "application/octet-stream"


def _policy(page: bytes) -> str:
    """Return a Content-Security-Policy (CSP level 3) that allows only the page's own script and style, by hash."""

    def hashes(tag: bytes) -> str:
        found = re.findall(b"<" + tag + b">(.*?)</" + tag + b">", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in found)

    return (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS = [
    ("Content-Security-Policy", _policy(PAGE)),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
    ("Vary", "Accept-Encoding"),
    # One request per connection: connections kept open would fill the few places.
    ("Connection", "close"),
]

Answer = tuple[str, str, bytes]

#: Answers of so many bytes are compressed: the page, and an hour of history, which would take seconds on a slow link.
LEAST_PACKED = 32_768

#: Bytes compressed without a pause: about 0.5 ms, during which the event loop does nothing else.
PIECE = 32_768

#: Most digits of a number in a query.
MOST_DIGITS = 15


class Web:
    """The WSGI application.

    Args:
        source: source of the data.
        history: what was recorded of it.
        version: version of gtcpserver.
        for_this_host: True if the address is a loopback one: refuse requests whose Host header has another name.
            Otherwise a web site open in a browser on this host could point its own name here (DNS rebinding), and read
            data meant only for this host.
    """

    def __init__(self, source: Source, history: History, version: str, *, for_this_host: bool) -> None:
        self._source = source
        self._history = history
        self._version = version
        self._for_this_host = for_this_host
        self._status = Fresh(source.status)
        self._stats = Fresh(lambda: _json({"version": version, **self._status.get()}))
        self._connections = Fresh(lambda: _json(source.connections()))
        self._encoded: tuple[Any, str, Answer] | None = None
        self._paths: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "/": lambda _: ("200 OK", "text/html; charset=utf-8", PAGE),
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/stats": lambda _: ("200 OK", JSON, self._stats.get()),
            "/connections": lambda _: ("200 OK", JSON, self._connections.get()),
            "/history": self._past,
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        headers = list(HEADERS)
        status, kind, body = self._answer(method, environ)
        if status.startswith("405"):
            headers.append(("Allow", "GET, HEAD"))
        if len(body) >= LEAST_PACKED and takes_gzip(environ.get("HTTP_ACCEPT_ENCODING", "")):
            body = packed(body)
            headers.append(("Content-Encoding", "gzip"))
        start_response(status, [*headers, ("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]

    def _answer(self, method: str, environ: dict[str, Any]) -> Answer:
        if self._for_this_host and not is_this_host(environ.get("HTTP_HOST", "")):
            return "421 Misdirected Request", TEXT, b"this address answers to localhost and IP addresses alone\n"
        answer = self._paths.get(environ["PATH_INFO"])
        color = ICONS.get(environ["PATH_INFO"])
        if color is not None and method in ("GET", "HEAD"):
            return "200 OK", "image/svg+xml", ICON.format(color).encode()
        if answer is None:
            return "404 Not Found", TEXT, f"there are {', '.join(self._paths)}\n".encode()
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", TEXT, b"only GET and HEAD\n"
        try:
            return answer(environ)
        except SourceError as error:
            return "503 Service Unavailable", TEXT, f"{error}\n".encode()

    def _metrics(self, environ: dict[str, Any]) -> Answer:
        status, accept = self._status.get(), environ.get("HTTP_ACCEPT", "")
        last = self._encoded
        if last is None or last[0] is not status or last[1] != accept:
            body, kind = metrics.encode(status, self._version, accept)
            self._encoded = last = (status, accept, ("200 OK", kind, body))
        return last[2]

    def _past(self, environ: dict[str, Any]) -> Answer:
        asked = dict(re.findall(r"(?:^|&)(\w+)=([^&]*)", environ.get("QUERY_STRING", "")))
        grain, since = asked.get("grain", "second"), asked.get("since", "0")
        if grain not in GRAINS:
            return "400 Bad Request", TEXT, f"grain must be one of {', '.join(GRAINS)}\n".encode()
        if not re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}", since):
            return "400 Bad Request", TEXT, b"since must be the number of a slot, or 0\n"
        return "200 OK", FLOATS, encode_slots(self._history.since(grain, int(since), time.monotonic()))

    def _healthz(self, _environ: dict[str, Any]) -> Answer:
        health = self._source.health()
        return ("200 OK", TEXT, b"ok\n") if health.alive else _unavailable(health.word)

    def _readyz(self, _environ: dict[str, Any]) -> Answer:
        health = self._source.health()
        return ("200 OK", TEXT, b"ready\n") if health.ready else _unavailable(health.word)


def is_this_host(host: str) -> bool:
    """Return whether a Host header names an IP address, localhost, or nothing (as HTTP/1.0 may)."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    name = name.strip("[]").lower().rstrip(".")
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def encode_slots(slots: Slots) -> bytes:
    """Return a line of JSON, whose length is a multiple of 4, and the floats of each series, in little-endian order.

    The line has `series`, their names; `count`, how many floats each has; `first`, the number of the first one's slot;
    `step`, the seconds of a slot; and `ends_at`, the end of the last one, in seconds since the epoch.
    """
    ends_at = wall_time((slots.first + slots.count) * slots.step)
    line = to_json(
        {
            "step": slots.step,
            "first": slots.first,
            "count": slots.count,
            "ends_at": round(ends_at, 3),
            "series": list(SERIES),
        }
    )
    values = array("f", b"".join(slots.values))
    if sys.byteorder == "big":
        values.byteswap()
    return line.encode() + b" " * (-(len(line) + 1) % values.itemsize) + b"\n" + values.tobytes()


def takes_gzip(accepted: str) -> bool:
    """Return whether an Accept-Encoding header (RFC 9110, section 12.5.3) names gzip, and not with a weight of 0."""
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accepted, re.IGNORECASE) is not None


def packed(body: bytes) -> bytes:
    """Return the bytes as gzip (RFC 1952). Yields to the event loop regularly."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    pieces = []
    for at in range(0, len(body), PIECE):
        pieces.append(packer.compress(body[at : at + PIECE]))
        gevent.sleep(0)
    return b"".join([*pieces, packer.flush()])


def _unavailable(word: str) -> Answer:
    return "503 Service Unavailable", TEXT, f"{word}\n".encode()


def _json(value: Any) -> bytes:
    # ASCII, whatever characters a client's name contains.
    return to_json(value).encode() + b"\n"
