"""TLS on a connection: the layer between a Stream and its socket.

OpenSSL never touches the socket. Left to itself, one SSL_read goes on until a record holds application data: a client
that sends nothing but key updates (RFC 8446 section 4.6.3; 27 bytes, 24 us of CPU) occupies it, and the event loop, for
as long as it sends, and nothing outside can stop it. So bytes pass through two ssl.MemoryBIO objects, one record at a
time: the result of a record is known before OpenSSL gets the next. This costs no more than letting OpenSSL read the
socket, since it asks the kernel twice for each record.
"""

from __future__ import annotations

from ssl import MemoryBIO, SSLWantReadError, SSLWantWriteError, SSLZeroReturnError
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import ref

import gevent
from gevent.socket import cancel_wait_ex
from greenlet import getcurrent

from gtcpserver.errors import TLSFlood, TruncatedStream
from gtcpserver.tls.client_hello import server_name_in
from gtcpserver.tls.info import is_unannounced_end
from gtcpserver.transfer.ends import reset_on_close

if TYPE_CHECKING:
    from gtcpserver.tls.acme import Answers

    from .connection import Connection
    from .owner import Owner

#: Bytes encrypted and sent at once: two records. Four cost 5 % less CPU a MiB, and one 5 % more; but a MemoryBIO keeps
#: the largest buffer it ever needed, 4/3 of this, for the life of the connection.
PIECE = 32 * 1024

#: Bytes written by one call. A single call for a whole large answer would show progress only at its end: a client that
#: reads steadily would look stalled.
WRITE_SIZE = 2 * PIECE

RECORD_SIZE = 16 * 1024  #: The most data in a record (RFC 8446 section 5.1).

HEADER = 5  #: Of a record: content type, version (two bytes), length (two bytes).

#: Bytes asked of the kernel at once: the largest record of TLS 1.3 (RFC 8446 section 5.2).
READ_SIZE = HEADER + RECORD_SIZE + 256

#: Bytes of the longest valid record; OpenSSL gets a longer one before its end, to report the error (RFC 5246 section
#: 6.2.3).
MAX_RECORD = RECORD_SIZE + 2048

#: Consecutive records without application data. BoringSSL takes 32, Go 16, OpenSSL any number of key updates.
MAX_RECORDS_WITHOUT_DATA = 32

#: Bytes of application data that forgive one such record, as does each second: a client that renews its keys every
#: second is no flood, but one that sends a byte of data between its key updates is.
DATA_TO_FORGIVE = 1024

#: Records of a client's handshake; 3 to 10 are usual. A chain of certificates takes the most, in records of 512 bytes
#: from clients with little memory (RFC 6066 section 4).
MAX_HANDSHAKE_RECORDS = 128

#: Records of one connection served without waiting for its socket before the others get a turn.
RECORDS_IN_A_TURN = 64

#: Content types of records, RFC 8446 section 5.1.
APPLICATION_DATA = 23
_CONTENT = {20: "change_cipher_spec", 21: "alert", 22: "handshake"}

#: Lengths of encrypted TLS 1.3 records without padding: content, its type (1), the tag (16).
_LENGTHS = {5 + 17: "key_update", 2 + 17: "alert", 17: "empty"}

#: OpenSSL's reasons for floods that it ends itself: 5 warning alerts in a row, 32 empty records.
_OPENSSL_ENDS = {"TOO_MANY_WARN_ALERTS": "alert", "RECORD_TOO_SMALL": "empty"}


class TLSLayer:
    """An encrypted stream's ``io``.

    Args:
        connection: the Connection whose socket it encrypts.
        context: an ssl.SSLContext, the standard library's or gevent's.
        report_truncation: raise TruncatedStream for an end without close_notify, instead of treating it as a normal
            end.
        older: a name, and the context to begin the handshake on if the client's first message has it: `Credentials`.
        answers: finds the context to begin it on if it is the question of an ACME authority: `Credentials`.
        hostname: name or address of the server whose client we are; None: we are the server.

    Attributes:
        is_challenge: it is such a question, and nothing follows the handshake (RFC 8737 section 3).
        object: the ``_ssl._SSLSocket`` with OpenSSL's state.
        server_name: name that the client asked for (SNI, RFC 6066 section 3), once an SNI callback has noted it.
        broken: part of a send is missing: send no close_notify, which would claim that the data is complete.
    """

    __slots__ = (
        "__weakref__",
        "_accepted",
        "_answers",
        "_ask_for",
        "_connection",
        "_feed",
        "_flood",
        "_forgiven_at",
        "_held",
        "_hello",
        "_hostname",
        "_incoming",
        "_left_over",
        "_older",
        "_outgoing",
        "_place",
        "_read",
        "_receive",
        "_records",
        "_report_truncation",
        "_stream",
        "_take",
        "_transmit",
        "_undelivered",
        "_unread",
        "_was_full",
        "_without_data",
        "_write",
        "broken",
        "is_challenge",
        "object",
        "server_name",
    )

    def __init__(
        self,
        connection: Connection,
        context: Any,
        report_truncation: bool = False,
        older: tuple[bytes, Any] | None = None,
        answers: Answers | None = None,
        hostname: str | None = None,
    ) -> None:
        self._connection = ref(connection)
        self._stream = stream = connection.stream
        self._report_truncation = report_truncation
        self._hostname = hostname
        self.server_name: str | None = hostname
        self.broken = False
        self._incoming = MemoryBIO()
        self._outgoing = MemoryBIO()
        self._older = older
        self._answers = answers
        self.is_challenge = False
        self._begin_on(context)
        self._feed = self._incoming.write
        self._take = self._outgoing.read
        self._receive = stream.sock.recv
        self._transmit = stream.sock.send
        # Bytes read from the socket; OpenSSL has those before _place, which is the start of a record.
        self._held = b""
        self._place = 0
        self._unread = False  # OpenSSL has decrypted more than was asked for
        self._left_over = False  # something is held, or unread
        self._ask_for = READ_SIZE
        self._was_full = False  # the last read from the socket may have left something there
        self._undelivered: bytes | memoryview = b""  # encrypted, not yet taken by the kernel
        self._accepted = 0  # bytes of a send that returned before they were delivered
        self._hello = b""  # the client's first handshake message, until its name is read
        self._records = 0
        self._without_data = 0
        self._forgiven_at = (0.0, 0)  # monotonic time, application data until then
        self._flood: TLSFlood | None = None

    def _begin_on(self, context: Any) -> None:
        # SNI callbacks get the owner.
        self.object = context._wrap_bio(  # noqa: SLF001 - the only way to name an owner
            self._incoming,
            self._outgoing,
            server_side=self._hostname is None,
            server_hostname=self._hostname,
            owner=self,
        )
        self._read = self.object.read
        self._write = self.object.write

    @property
    def context(self) -> Any:
        """The SSLContext; an SNI callback may assign another one."""
        return self.object.context

    @context.setter
    def context(self, context: Any) -> None:
        self.object.context = context

    def take_requested_name(self) -> str | None:
        """Return the name in the client's first message, verbatim; None without one. Call once, in an SNI callback."""
        hello, self._hello = self._hello, b""
        return server_name_in(hello)

    def _sslsock(self) -> TLSLayer:
        # gevent's SSLContext passes the result of the owner's _sslsock() to a user's SNI callback.
        return self

    def pending(self) -> int:
        """Return more than 0 if data is ready for which the socket will not become readable."""
        return int(self.object.pending()) or int(self._holds_record())

    # -- reading -----------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int) -> bytes:
        # Hot path: exactly one whole record arrived.
        if self._left_over or not bufsize:
            return self._recv_left_over(bufsize)
        chunk = self._receive(self._ask_for)
        size = len(chunk)
        if size < 5 or (chunk[3] << 8 | chunk[4]) + 5 != size:
            self._held, self._place, self._left_over = chunk, 0, True
            self._was_full = size == self._ask_for
            return self._recv_left_over(bufsize)
        self._feed(chunk)
        try:
            data: bytes = self._read(bufsize)
        except OSError as error:
            return b"" if self._is_end(error, chunk) else self._recv_left_over(bufsize)
        if len(data) == bufsize:
            self._unread = self._left_over = self.object.pending() > 0
        if size == self._ask_for:
            self._do_not_wait()
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0) -> int:
        data = self.recv(nbytes or len(buffer))
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)

    def _recv_left_over(self, bufsize: int) -> bytes:
        """Receive when more, or less, than one record is held."""
        if not bufsize:
            return b""
        if self._flood is not None:
            raise self._flood
        if self._records >= RECORDS_IN_A_TURN:
            # Here, while there is no data that a kill would lose.
            self._records = 0
            self._give_turn()
        if not self._unread:
            # Unless this call empties the socket: the event of its input may have been one with that of _do_not_wait().
            self._was_full = True
        while True:
            record = b"" if self._unread else self._feed_record()
            try:
                data: bytes = self._read(bufsize)
            except OSError as error:
                self._unread = False
                if self._is_end(error, record):
                    return b""
                continue
            self._unread = len(data) == bufsize and self.object.pending() > 0
            self._left_over = self._unread or self._place < len(self._held)
            if self._was_full or (self._left_over and not self._unread and self._holds_record()):
                self._do_not_wait()
            return data

    def _do_not_wait(self) -> None:
        """Make the stream's next read skip the wait for a readable socket."""
        self._stream.note_input()
        self._records += 1
        if self._records >= RECORDS_IN_A_TURN:
            self._left_over = True  # the next read gives the others their turn

    def _is_end(self, error: OSError, record: bytes) -> bool:
        """Return True for the peer's end, False to try the next record; raise other errors."""
        if isinstance(error, SSLWantReadError):
            self._note_without_data(record)
            return False
        if isinstance(error, SSLZeroReturnError):
            return True
        if is_unannounced_end(error):
            if self._report_truncation:
                raise self._stream.note(TruncatedStream("the peer closed without a TLS close_notify")) from error
            return True
        self._try_to_flush()  # the alert
        flood = _OPENSSL_ENDS.get(getattr(error, "reason", None) or "")
        if flood is not None:
            self._end_flood(flood)
        raise error

    def _feed_record(self, ahead: bool = True) -> bytes:
        """Give OpenSSL the next record and return it. At the peer's end, pass on the end and return b"".

        Args:
            ahead: also read what follows the record.

        Raises:
            BlockingIOError: the record has not arrived yet.
        """
        while True:
            held, place = self._held, self._place
            size = _size_of_record(held, place)
            missing = place + size - len(held)
            if missing <= 0:
                break
            if size > RECORD_SIZE:
                # More of this size will follow: read each separately, so that none must be reassembled.
                self._ask_for = size
                ahead = False
            wanted = self._ask_for if ahead else missing
            more = self._receive(wanted)
            self._was_full = len(more) == wanted
            if not more:
                return self._feed_end()
            self._held, self._place = held[place:] + more if place < len(held) else more, 0
        record = held[place : place + size]
        self._place = place = place + size
        if place == len(held):
            self._held, self._place = b"", 0
        self._feed(record)
        return record

    def _feed_end(self) -> bytes:
        cut_short = self._held[self._place :]
        self._held, self._place = b"", 0
        if cut_short:
            self._feed(cut_short)
        self._incoming.write_eof()
        return b""

    def _holds_record(self) -> bool:
        held, place = self._held, self._place
        return place < len(held) and place + _size_of_record(held, place) <= len(held)

    def _note_without_data(self, record: bytes) -> None:
        """Note a record from which OpenSSL produced no data."""
        now, received = monotonic(), self._stream.bytes_received
        then, received_then = self._forgiven_at
        forgiven = int(now - then) + (received - received_then) // DATA_TO_FORGIVE
        if forgiven:
            self._without_data = max(0, self._without_data - forgiven)
            self._forgiven_at = (now, received)
        self._without_data += 1
        if self._without_data > MAX_RECORDS_WITHOUT_DATA:
            self._end_flood(_kind_of_record(record, self.object.version()))
        # The answer to a key update. If the kernel does not take it, it is sent before the next data.
        self._try_to_flush()
        self._give_turn()

    def _end_flood(self, kind: str) -> None:
        """Raise TLSFlood, now and at each further read; reset the connection when it is closed."""
        connection = self._connection()
        self._flood = flood = TLSFlood(f"too many TLS records without data ({kind})", kind)
        self._held, self._place, self._left_over = b"", 0, True
        if connection is not None:
            reset_on_close(connection)
            owner: Owner | None = connection.server
            if owner is not None:
                owner.count_tls_flood(kind)
        raise flood

    def _give_turn(self) -> None:
        """Let other greenlets run, unless this call must not wait."""
        stream = self._stream
        if stream.timeout != 0.0 and getcurrent() is not stream.hub:
            gevent.sleep(0)
            if stream.closed:
                raise cancel_wait_ex()

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0) -> int:
        # Hot path: the kernel takes it all.
        if flags:
            raise ValueError(f"flags cannot be used on an encrypted connection, got {flags}")
        size = len(data)
        if not size:
            return 0
        if self._undelivered or self._accepted:
            self._deliver()
            if self._accepted:
                accepted, self._accepted = self._accepted, 0
                return accepted
        if size > PIECE:
            return self._send_large(memoryview(data).cast("B")[:WRITE_SIZE])
        try:
            size = self._write(data)
        except OSError as error:
            size = self._write_again(data, error)
        record = self._take()
        try:
            sent = self._transmit(record)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._undelivered = record  # ENOBUFS, ENOMEM: lose nothing, in case the caller goes on
            raise
        if sent < len(record):
            self._wait_until_sent(record, sent, size)
        return size

    def _send_large(self, data: memoryview) -> int:
        """Send all pieces of ``data`` without returning to the caller after each one."""
        write, take, transmit = self._write, self._take, self._transmit
        for end in range(PIECE, len(data) + PIECE, PIECE):
            part = data[end - PIECE : end]
            try:
                write(part)
            except OSError as error:
                self._write_again(part, error)
            record = take()
            try:
                sent = transmit(record)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._undelivered = record
                raise
            if sent < len(record):
                size = min(end, len(data))
                self._wait_until_sent(record, sent, size)
                return size
        return len(data)

    def _wait_until_sent(self, record: bytes, sent: int, size: int) -> None:
        self._undelivered = memoryview(record)[sent:]
        self._accepted = size
        self._deliver()
        self._accepted = 0

    def _write_again(self, data: Any, error: OSError) -> int:
        """Retry a failed write that waits for the client."""
        while isinstance(error, SSLWantReadError):
            # Part of a handshake message of the client arrived.
            self._wait_for_record()
            try:
                return self._write(data)  # type: ignore[no-any-return]
            except OSError as another:
                error = another
        if isinstance(error, SSLZeroReturnError) or is_unannounced_end(error):
            raise BrokenPipeError("the peer has closed the connection") from error
        raise error

    def _deliver(self) -> None:
        """Wait until the kernel has taken the encrypted bytes; BlockingIOError on a socket that must not wait.

        If the wait ends early, they are sent before the next data.
        """
        while not self._flush():
            if self._stream.timeout == 0.0:
                raise BlockingIOError
            self._accepted = 0
            self._stream.wait_writable()

    def _flush(self) -> bool:
        """Send the output of OpenSSL; False if the kernel did not take all of it."""
        data = self._undelivered
        if self._outgoing.pending:
            data = bytes(data) + self._take()
            self._undelivered = data
        if data:
            try:
                sent = self._transmit(data)
            except BlockingIOError:
                return False
            self._undelivered = memoryview(data)[sent:] if sent < len(data) else b""
        return not self._undelivered

    def _try_to_flush(self) -> None:
        try:
            self._flush()
        except OSError:
            pass  # nobody is left to tell

    # -- handshake and end -------------------------------------------------------------------------------------------

    def advance_handshake(self) -> None:
        """Advance the handshake as far as possible without waiting. Read nothing beyond it.

        Raises:
            SSLWantReadError, SSLWantWriteError: the handshake must wait for the socket.
            TLSFlood: the handshake has too many records.
            OSError: the handshake failed.
        """
        while True:
            done = True
            try:
                self.object.do_handshake()
            except SSLWantReadError:
                done = False
            except OSError:
                self._try_to_flush()  # the alert
                raise
            if not self._flush():
                raise SSLWantWriteError
            if done:
                self._records = 0
                self._hello = b""
                return
            self._records += 1
            if self._records > MAX_HANDSHAKE_RECORDS:
                raise TLSFlood(f"more than {MAX_HANDSHAKE_RECORDS} records in a TLS handshake", "handshake")
            try:
                record = self._feed_record(ahead=False)
            except BlockingIOError:
                self._records -= 1
                raise SSLWantReadError from None
            if self._older is not None:
                name, context = self._older
                self._older = None
                if name in record:
                    self._begin_on(context)  # OpenSSL has not seen this first record yet
            if self._answers is not None:
                context = self._answers.find(record)
                self._answers = None
                if context is not None:
                    self._begin_on(context)
                    self.is_challenge = True
            if self.server_name is None:
                self._hello += record[HEADER:]

    def handshake(self) -> None:
        """Complete the handshake, blocking the greenlet."""
        while True:
            try:
                self.advance_handshake()
                return
            except SSLWantReadError:
                self._stream.wait_readable()
            except SSLWantWriteError:
                self._stream.wait_writable()

    def _wait_for_record(self) -> None:
        self._stream.drained = False  # more may follow the record
        while True:
            try:
                self._note_without_data(self._feed_record(ahead=False))
                return
            except BlockingIOError:
                if self._stream.timeout == 0.0:
                    raise
            self._stream.wait_readable()

    def close_notify(self) -> None:
        """Send close_notify (RFC 8446 section 6.1), if possible without waiting.

        Nothing can be read afterwards.
        """
        if self.broken or self._undelivered:
            return  # a send was cut short: this is not an orderly end
        try:
            self.object.shutdown()
        except (OSError, ValueError):
            pass  # WantRead: sent, and the peer has not answered yet. Anything else: nobody is left to tell.
        self._try_to_flush()

    def close_notify_and_read_on(self) -> None:
        """As :meth:`close_notify`, for a half-close."""
        stream = self._stream
        # The ssl module calls SSL_shutdown twice, and OpenSSL stops reading when the second call finds application
        # data.
        if self._unread:
            data = self._read(self.object.pending())
            stream.bytes_received += len(data)
            stream.kept += data
            self._unread = False
        self.close_notify()

    def unwrap(self) -> bytes:
        """End TLS and continue in plain text: send close_notify, wait for the peer's, and return the bytes after it."""
        while True:
            try:
                self.object.shutdown()
            except SSLWantReadError:
                self._deliver()
                self._wait_for_record()
            else:
                self._deliver()
                return self._held[self._place :]


def _size_of_record(held: bytes, place: int) -> int:
    """Return the size of a record in bytes, header included; the header's size until the header is complete.

    For bytes that are not TLS, return the size of all of them: OpenSSL reports what is wrong.
    """
    if len(held) - place < HEADER:
        return HEADER
    length = held[place + 3] << 8 | held[place + 4]
    return HEADER + length if held[place + 1] == 3 and length <= MAX_RECORD else len(held) - place


def _kind_of_record(record: bytes, version: str | None) -> str:
    """Return the kind of a record without data: "key_update", "alert", "handshake", "change_cipher_spec", "empty".

    TLS 1.3 encrypts the content type, but the lengths of the first two identify them (with one byte of type and 16 of
    tag), unless they are padded: "other".
    """
    content = record[0] if record else 0
    if content != APPLICATION_DATA:
        return _CONTENT.get(content, "other")
    return _LENGTHS.get(len(record) - HEADER, "other") if version == "TLSv1.3" else "empty"
