"""StaticFiles: the handler."""

from __future__ import annotations

import errno
import functools
import html
import http
import mimetypes
import os
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from time import monotonic, time
from typing import Any
from urllib.parse import quote

from gtcpserver.checks import check_number
from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.logs import FaultLimiter, also, own_logger
from gtcpserver.errors import ConfigError, DeadlineExceeded
from gtcpserver.linux import MSG_MORE
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.transfer.disk import in_thread

from .lookup import Directory, is_directory, is_file, list_directory
from .request import END_OF_HEAD, LONGEST_HEAD, BadRequest, Request, is_unchanged, parse_head, wanted_range

log = own_logger("gtcpserver.access")
faults = own_logger("gtcpserver.files")

#: Files up to this size are read and sent together with the head, in one call, which takes 0.6 of sendfile's CPU for
#: 16 KiB, 0.8 for 64 KiB and as much for 128 KiB. Not larger: a client that does not read holds this much memory.
SMALL = 64 * 1024

#: Maximum names in a directory listing: a client that does not read holds this much memory (1 MB; 3 if each name has
#: the maximum length). A browser takes ten seconds to show ten times as many.
MOST_LISTED = 10_000

#: Names written at a time (0.5 ms); other connections run in between.
ROWS_A_PIECE = 100

#: Status codes for errors of the file system; everything else is a 500.
_STATUS_OF_ERRNO = {
    errno.ENOENT: 404,
    errno.ENOTDIR: 404,
    errno.ENAMETOOLONG: 404,
    errno.ELOOP: 404,
    errno.EXDEV: 404,  # outside the directory: not even its existence is revealed
    errno.ENXIO: 404,  # a socket
    errno.EACCES: 403,
    errno.EPERM: 403,
    # Neither the client's fault nor ours, and perhaps gone the next time.
    errno.EMFILE: 503,
    errno.ENFILE: 503,
    errno.ENOMEM: 503,
    errno.ENOBUFS: 503,
    errno.EAGAIN: 503,
    errno.EINTR: 503,
    errno.EIO: 503,
    errno.ESTALE: 503,  # NFS
    errno.ETIMEDOUT: 503,
}


class StaticFiles:
    """Answer GET and HEAD with the files of a directory: ``Server("*:80", StaticFiles("/srv/www"))``.

    HTTP/1.1 (RFC 9110, 9112) with keep-alive, ranges (one at a time), and conditions by date and entity tag. Nothing
    outside the directory is served, whatever the path or symbolic link, and nothing but regular files.

    Args:
        directory: its path. It is opened once: a symbolic link is followed now and not at each request.
        index: file to serve for its directory; None: none.
        listing: list the files of a directory without an index; otherwise it is a 403.
        hidden: also serve files and directories whose names begin with a dot.
        follow_symlinks: follow symbolic links that lead outside the directory.
        cache_control: value of a Cache-Control header for files, such as "max-age=3600".
        head_timeout: seconds for the head of a request, once it has begun.
        idle_timeout: seconds that a connection may be silent; used if the server has no ``timeout``.
        log_requests: write a line for each request to the logger "gtcpserver.access": client, request, status, and the
            bytes of the body to be sent.

    Attributes:
        counters: "bad_request": requests refused because they violate HTTP; "file_error": existing files that could not
            be read, which is a 500 or 503 (out of descriptors, a failing disk).

    Raises:
        ConfigError: an invalid option; the directory cannot be opened.

    Example::

        from gtcpserver import Server
        from gtcpserver.static_files import StaticFiles

        files = StaticFiles("www", cache_control="max-age=3600")
        server = Server("127.0.0.1:8000", files, timeout=30)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] = ".",
        *,
        index: str | None = "index.html",
        listing: bool = False,
        hidden: bool = False,
        follow_symlinks: bool = False,
        cache_control: str | None = None,
        head_timeout: float = 30.0,
        idle_timeout: float = 75.0,
        log_requests: bool = False,
    ) -> None:
        check_number("head_timeout", head_timeout, above=0)
        check_number("idle_timeout", idle_timeout, above=0)
        if index is not None and (not index or "/" in index):
            raise ConfigError(f"index must be the name of a file, got {index!r}")
        if cache_control is not None and not (cache_control.isascii() and cache_control.isprintable()):
            raise ConfigError(f"cache_control must be printable ASCII, got {cache_control!r}")
        try:
            self.directory = Directory(directory, follow_symlinks)
        except OSError as error:
            raise ConfigError(f"directory must be one that can be read, got {directory!r}: {error.strerror}") from None
        self._index = None if index is None else index.encode()
        self._listing = listing
        self._hidden = hidden
        self._cache_control = f"Cache-Control: {cache_control}\r\n" if cache_control else ""
        self._head_timeout = head_timeout
        self._idle_timeout = idle_timeout
        self._log_requests = log_requests
        self.counters: Counter[str] = Counter()
        self._faults = FaultLimiter()

    def __call__(self, conn: Connection) -> None:
        """Serve one client until it, a timeout or a stop ends the connection."""
        if conn.gettimeout() is None:
            conn.settimeout(self._idle_timeout)
        idle = conn.idle()
        received = b""
        while True:
            if not received:
                with idle:
                    received = conn.recv(LONGEST_HEAD)
                if not received:
                    return
            try:
                end = received.find(END_OF_HEAD)
                if end < 0:
                    received = self._rest_of_head(conn, received)
                    end = received.find(END_OF_HEAD)
                    if end < 0:
                        raise BadRequest(400, "the request ended before its head did")
                request = parse_head(received[:end])
            except BadRequest as error:
                self.counters["bad_request"] += 1
                self._refuse(conn, None, error)
                return
            received = received[end + len(END_OF_HEAD) :]
            if not received and conn.should_leave:
                request.keep = False  # told now, the client sends its next request elsewhere
            if not self._answer(conn, request):
                return

    def _rest_of_head(self, conn: Connection, begun: bytes) -> bytes:
        received, searched = bytearray(begun), 0
        try:
            with conn.deadline(self._head_timeout):
                while received.find(END_OF_HEAD, searched) < 0:
                    searched = max(0, len(received) - len(END_OF_HEAD))
                    first = received.find(b"\n")
                    if first >= 0 and received[first - 1 : first] != b"\r":
                        # The end of such a head would never come.
                        raise BadRequest(400, "lines must end with CR LF")
                    if len(received) > LONGEST_HEAD:
                        if b"\r\n" not in received:
                            raise BadRequest(414, f"the request line is longer than {LONGEST_HEAD} bytes")
                        raise BadRequest(431, f"the head of the request is longer than {LONGEST_HEAD} bytes")
                    more = conn.recv(LONGEST_HEAD)
                    if not more:
                        break
                    received += more
        except DeadlineExceeded:
            raise BadRequest(408, f"the request took longer than {self._head_timeout:g} seconds") from None
        return bytes(received)

    # -- one request -------------------------------------------------------------------------------------------------

    def _answer(self, conn: Connection, request: Request) -> bool:
        """Answer a request; return False if the connection ends with it."""
        fd = -1
        try:
            if request.method not in ("GET", "HEAD"):
                raise BadRequest(405, f"this server has files to GET, and nothing to {request.method[:20]}")
            segments = request.path
            if not self._hidden and any(segment.startswith(b".") for segment in segments):
                raise BadRequest(404, "there is no such file")
            fd, status = self._open(segments)
            if is_directory(status):
                if segments[-1]:
                    # Relative links in it begin at the directory.
                    self._send(conn, request, 301, _redirect(segments), b"")
                    return request.keep
                if not self._listing:
                    raise BadRequest(403, "this is a directory")
                self._send_list(conn, request, fd, segments)
            elif is_file(status):
                if not segments[-1] and segments != [b""] and self._index is None:
                    raise BadRequest(404, "there is no such directory")
                return self._send_file(conn, request, fd, status, segments[-1] or self._index or b"")
            else:
                raise BadRequest(404, "there is no such file")
            return request.keep
        except BadRequest as error:
            return self._refuse(conn, request, error)
        finally:
            if fd >= 0:
                close_descriptor(fd)

    def _open(self, segments: list[bytes]) -> tuple[int, os.stat_result]:
        """Return the descriptor and status of what a path names: of a directory's index, if it has one."""
        inner = segments if segments[-1] else segments[:-1]
        wants_directory = not segments[-1]
        try:
            if wants_directory and self._index is not None:
                try:
                    fd = self.directory.open([*inner, self._index])
                except FileNotFoundError:
                    fd = self.directory.open(inner)
            else:
                fd = self.directory.open(inner)
        except OSError as error:
            raise self._file_error(error) from None
        try:
            try:
                found = os.fstat(fd)
            except OSError as error:
                raise self._file_error(error) from None
            if wants_directory and self._index is None and not is_directory(found):
                raise BadRequest(404, "there is no such directory")
        except BaseException:
            close_descriptor(fd)
            raise
        return fd, found

    def _file_error(self, error: OSError) -> BadRequest:
        """Return the response for an error of the file system."""
        status = _STATUS_OF_ERRNO.get(error.errno or 0, 500)
        if status >= 500:
            self._note_file_error(error)
        return BadRequest(status, _REASONS.get(status, "the file cannot be read"))

    def _note_file_error(self, error: OSError) -> None:
        self.counters["file_error"] += 1
        left_out = self._faults.allow(error.errno)
        if left_out is not None:
            faults.warning("cannot read a file below %s: %s%s", self.directory.path, error, also(left_out))

    def _send_file(self, conn: Connection, request: Request, fd: int, status: os.stat_result, name: bytes) -> bool:
        size, modified = status.st_size, int(status.st_mtime)
        etag = f'"{status.st_mtime_ns:x}-{size:x}"'
        described = f"Last-Modified: {_date(modified)}\r\nETag: {etag}\r\nAccept-Ranges: bytes\r\n{self._cache_control}"
        if is_unchanged(request.fields, etag, modified):
            self._write(conn, request, 304, described)
            return request.keep
        part = None
        if "range" in request.fields and request.method == "GET":  # ignored for other methods (RFC 9110 section 14.2)
            try:
                part = wanted_range(request.fields, size, etag, modified)
            except BadRequest as error:
                return self._refuse(conn, request, error, f"Content-Range: bytes */{size}\r\n")
        offset, count = part or (0, size)
        if part is not None:
            described += f"Content-Range: bytes {offset}-{offset + count - 1}/{size}\r\n"
        head = f"{described}Content-Type: {content_type(name)}\r\nContent-Length: {count}\r\n"
        code = 200 if part is None else 206
        if request.method == "HEAD":
            self._write(conn, request, code, head)
        elif count <= SMALL:
            try:
                body = self.directory.read(fd, status.st_dev, offset, count)
            except OSError as error:
                raise self._file_error(error) from None
            if len(body) != count:  # it was truncated meanwhile; nothing is promised yet
                return self._refuse(conn, request, BadRequest(503, "the file is being written"))
            self._write(conn, request, code, head, body)
        else:
            self._write(conn, request, code, head, following=count)
            try:
                sent = conn.sendfile(fd, offset, count)
            except OSError as error:
                if isinstance(error, (ConnectionError, TimeoutError)) or _STATUS_OF_ERRNO.get(error.errno or 0) != 503:
                    raise
                self._note_file_error(error)
                sent = -1
            if sent != count:
                conn.abort()  # truncated meanwhile: a normal end would say that this was all
                return False
        return request.keep

    # -- a list ------------------------------------------------------------------------------------------------------

    def _send_list(self, conn: Connection, request: Request, fd: int, segments: list[bytes]) -> None:
        try:
            names, more = in_thread(list_directory, fd, self._hidden, MOST_LISTED)
        except OSError as error:
            raise self._file_error(error) from None
        pieces = _list(segments, names, more)
        if len(names) <= ROWS_A_PIECE:
            self._send(conn, request, 200, _HTML, b"".join(pieces))
            return
        if request.old:
            request.keep = False
        head = _HTML if request.old else f"{_HTML}Transfer-Encoding: chunked\r\n"
        if request.method == "HEAD":
            self._write(conn, request, 200, head)
            return
        size = 0
        try:
            self._write(conn, request, 200, head, following=-1)
            for piece in pieces:
                conn.sendall(piece if request.old else b"%x\r\n%b\r\n" % (len(piece), piece))
                size += len(piece)
                # It is writable, but other connections' events come first; sleep(0) would run before them.
                conn.stream.wait_writable()
            if not request.old:
                conn.sendall(b"0\r\n\r\n")
        except BaseException:
            conn.abort()  # a normal end would say that this was all
            raise
        finally:
            if self._log_requests:
                self._log(conn, request, 200, size)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _refuse(self, conn: Connection, request: Request | None, error: BadRequest, more: str = "") -> bool:
        keep = request is not None and request.keep
        if error.status == 405:
            more += "Allow: GET, HEAD\r\n"
        self._send(
            conn, request, error.status, f"{more}Content-Type: text/plain; charset=utf-8\r\n", f"{error}\n".encode()
        )
        return keep

    def _send(self, conn: Connection, request: Request | None, status: int, head: str, body: bytes) -> None:
        head += f"Content-Length: {len(body)}\r\n"
        self._write(conn, request, status, head, b"" if request is not None and request.method == "HEAD" else body)

    def _write(
        self,
        conn: Connection,
        request: Request | None,
        status: int,
        head: str,
        body: bytes | bytearray = b"",
        following: int = 0,
    ) -> None:
        """Write the head, and the body unless ``following`` bytes of it are sent later.

        -1 follow: their number is not known yet, and the caller writes the log line.
        """
        keep = request is not None and request.keep
        start = (
            # nosniff: a browser must not run a file because it looks like a script; its name decides.
            f"HTTP/1.1 {_STATUS_LINE[status]}\r\nDate: {_now()}\r\nX-Content-Type-Options: nosniff\r\n{head}"
            f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
        ).encode("latin-1")
        if self._log_requests and following >= 0:
            self._log(conn, request, status, len(body) or following)
        # MSG_MORE: the head shares its first packet with the file (send(2)). Over TLS there are no flags.
        conn.sendall(start + body if body else start, MSG_MORE if following and conn.tls is None else 0)

    def _log(self, conn: Connection, request: Request | None, status: int, size: int) -> None:
        address: Any = conn.client_address
        client = address[0] if isinstance(address, tuple) else "unix"
        # The target is visible ASCII; a quotation mark would end the quoted part.
        asked = "-" if request is None else f"{request.method} {request.target}".replace('"', "%22")
        said = {"client": client, "request": asked, "status": status, "bytes": size}
        log.info('%s "%s" %d %d', *said.values(), extra=said)


def _list(segments: list[bytes], names: list[str], more: bool) -> Iterator[bytes]:
    """Yield the page of a directory, in pieces. Those of `names` that are directories end with a slash."""
    title = html.escape("/" + "/".join(segment.decode("utf-8", "replace") for segment in segments))
    yield (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{title}</title>\n<h1>{title}</h1>\n<ul>\n"
        + ('<li><a href="../">../</a></li>\n' if len(segments) > 1 else "")
    ).encode()
    for at in range(0, len(names), ROWS_A_PIECE):
        yield "".join(map(_row, names[at : at + ROWS_A_PIECE])).encode()
    note = f"<p>There are more: only {len(names):,} are listed.</p>\n" if more else ""
    yield f"</ul>\n{note}</html>\n".encode()


def _row(name: str) -> str:
    # "./": a name with a colon in it would be read as a scheme
    shown = html.escape(name.encode("utf-8", "replace").decode())
    return f'<li><a href="./{quote(os.fsencode(name))}">{shown}</a></li>\n'


_HTML = "Content-Type: text/html; charset=utf-8\r\n"
_STATUS_LINE = {status.value: f"{status.value} {status.phrase}" for status in http.HTTPStatus}
_REASONS = {403: "this file may not be read", 404: "there is no such file", 503: "the file cannot be read now"}


def _redirect(segments: list[bytes]) -> str:
    # Only the path: the client may call this host by any name. A path that began with two slashes would name another
    # host.
    return f"Location: /{'/'.join(quote(segment) for segment in segments)}/\r\n"


@functools.lru_cache(maxsize=4096)
def content_type(name: bytes) -> str:
    """Return a file's media type by its name: "text/html; charset=utf-8"; "application/octet-stream" if unknown."""
    kind, encoding = mimetypes.guess_type(os.fsdecode(name))
    if encoding is not None:
        # A compressed file is served as such, not decompressed by the client on the way.
        return {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}.get(
            encoding, "application/octet-stream"
        )
    if kind is None:
        return "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") or kind == "application/javascript" else kind


@functools.lru_cache(maxsize=1024)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


_clock = (-1.0, "")


def _now() -> str:
    """Return the Date header's value, made once a second (4 us)."""
    global _clock
    now = monotonic()
    if now - _clock[0] >= 0.5 or _clock[0] < 0:
        _clock = (now, formatdate(time(), usegmt=True))
    return _clock[1]
