"""TLS on a connection: the layer that a Stream reads from and writes to.

OpenSSL never touches the socket. Left to itself, one SSL_read goes on until a record holds application data: a client
that sends nothing but key updates (RFC 8446 section 4.6.3; 27 bytes, 24 us of CPU) keeps it, and the event loop with
it, for as long as it sends, and nothing outside can stop it. So bytes pass through two ssl.MemoryBIO, one record at a
time: what came of a record is known before OpenSSL gets the next. This costs no more than letting OpenSSL read by
itself, since it asks the kernel twice for each record.
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
from gtcpserver.process.watcher import stop_watcher
from gtcpserver.tls.client_hello import server_name_in
from gtcpserver.tls.info import is_unannounced_end
from gtcpserver.transfer.ends import reset_on_close

if TYPE_CHECKING:
    from .connection import Connection
    from .owner import Owner

#: Encrypted and sent at once: two records. Four cost 5 % less CPU a MiB, and one 5 % more; but a MemoryBIO keeps the
#: largest buffer that it ever needed, 4/3 of this, for as long as the connection lives.
PIECE = 32 * 1024

#: Written by one call. One for all of a large answer would tell only at its end that it moves, so that a client that
#: reads steadily would look like one that has stopped.
WRITE_SIZE = 2 * PIECE

RECORD_SIZE = 16 * 1024  #: The most data in a record (RFC 8446 section 5.1).

HEADER = 5  #: Of a record: content type, version (two bytes), length (two bytes).

#: Asked of the kernel at once: the largest record of TLS 1.3 (RFC 8446 section 5.2).
READ_SIZE = HEADER + RECORD_SIZE + 256

#: Longer records are an error, about which OpenSSL need not wait for the end (RFC 5246 section 6.2.3).
MAX_RECORD = RECORD_SIZE + 2048

#: Records without application data, in a row. BoringSSL takes 32, Go 16, OpenSSL any number of key updates.
MAX_RECORDS_WITHOUT_DATA = 32

#: ... of which one is forgiven for each second, and for this much application data, in bytes: a client that renews its
#: keys every second is no flood, and one that puts a byte of data between its key updates is.
DATA_TO_FORGIVE = 1024

#: Records of a client's handshake; 3 to 10 are usual. Most in a chain of certificates, in records of 512 bytes for
#: clients with little memory (RFC 6066 section 4).
MAX_HANDSHAKE_RECORDS = 128

#: Records of one connection that are served, without a wait for its socket, before the others get a turn.
RECORDS_IN_A_TURN = 64

#: Content types of records, RFC 8446 section 5.1.
APPLICATION_DATA = 23
_CONTENT = {20: "change_cipher_spec", 21: "alert", 22: "handshake"}

#: Of encrypted records of TLS 1.3 without padding: content, its type (1), the tag (16).
_LENGTHS = {5 + 17: "key_update", 2 + 17: "alert", 17: "empty"}

#: What OpenSSL says of floods that it ends itself: 5 warning alerts in a row, 32 empty records.
_OPENSSL_ENDS = {"TOO_MANY_WARN_ALERTS": "alert", "RECORD_TOO_SMALL": "empty"}


class TLSLayer:
    """An encrypted stream's ``io``.

    Args:
        connection: whose socket it encrypts.
        context: an ssl.SSLContext, the standard library's or gevent's.
        report_truncation: an end without close_notify raises TruncatedStream instead of looking like an end.

    Attributes:
        object: the ``_ssl._SSLSocket`` that OpenSSL's state is in.
        server_name: what the client asked for (SNI, RFC 6066 section 3), once an SNI callback has noted it.
        broken: something is missing from what was sent: no close_notify, which would say that all is well.
    """

    __slots__ = (
        "__weakref__",
        "_accepted",
        "_ask_for",
        "_connection",
        "_feed",
        "_flood",
        "_forgiven_at",
        "_held",
        "_hello",
        "_incoming",
        "_left_over",
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
        "_without_data",
        "_write",
        "broken",
        "object",
        "server_name",
    )

    def __init__(self, connection: Connection, context: Any, report_truncation: bool = False) -> None:
        self._connection = ref(connection)
        self._stream = stream = connection.stream
        self._report_truncation = report_truncation
        self.server_name: str | None = None
        self.broken = False
        self._incoming = MemoryBIO()
        self._outgoing = MemoryBIO()
        # The owner is what an SNI callback gets.
        self.object = context._wrap_bio(  # noqa: SLF001 - the only way to name an owner
            self._incoming, self._outgoing, server_side=True, owner=self
        )
        self._read = self.object.read
        self._write = self.object.write
        self._feed = self._incoming.write
        self._take = self._outgoing.read
        self._receive = stream.sock.recv
        self._transmit = stream.sock.send
        # Read from the socket; OpenSSL has got it up to _place, which is the beginning of a record.
        self._held = b""
        self._place = 0
        self._unread = False  # OpenSSL has decrypted more than was asked for
        self._left_over = False  # something is held, or unread
        self._ask_for = READ_SIZE
        self._undelivered: bytes | memoryview = b""  # encrypted, and not taken by the kernel yet
        self._accepted = 0  # bytes of a send that did not wait until they were delivered
        self._hello = b""  # the client's first handshake message, until its name was asked for
        self._records = 0
        self._without_data = 0
        self._forgiven_at = (0.0, 0)  # monotonic time, application data until then
        self._flood: TLSFlood | None = None

    @property
    def context(self) -> Any:
        """The SSLContext; an SNI callback may assign another one."""
        return self.object.context

    @context.setter
    def context(self, context: Any) -> None:
        self.object.context = context

    def take_requested_name(self) -> str | None:
        """What the client's first message asks for, as it is written there; None: nothing. Once, in an SNI callback."""
        hello, self._hello = self._hello, b""
        return server_name_in(hello)

    def _sslsock(self) -> TLSLayer:
        # gevent's SSLContext hands an SNI callback of the user's what the owner's _sslsock() returns.
        return self

    def pending(self) -> int:
        """More than 0: there is something to read for which the socket will not become readable."""
        return int(self.object.pending()) or int(self._holds_record())

    # -- reading -----------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int) -> bytes:
        # Hot: one record has come, whole and alone.
        if self._left_over or not bufsize:
            return self._recv_left_over(bufsize)
        chunk = self._receive(self._ask_for)
        size = len(chunk)
        if size < 5 or (chunk[3] << 8 | chunk[4]) + 5 != size:
            self._held, self._place, self._left_over = chunk, 0, True
            return self._recv_left_over(bufsize)
        self._feed(chunk)
        try:
            data: bytes = self._read(bufsize)
        except OSError as error:
            return b"" if self._is_end(error, chunk) else self._recv_left_over(bufsize)
        if len(data) == bufsize:
            self._unread = self._left_over = self.object.pending() > 0
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0) -> int:
        data = self.recv(nbytes or len(buffer))
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)

    def _recv_left_over(self, bufsize: int) -> bytes:
        """``recv`` where there is more, or less, than one record."""
        if not bufsize:
            return b""
        if self._flood is not None:
            raise self._flood
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
            if self._left_over and not self._unread and self._holds_record():
                self._do_not_wait()
            return data

    def _do_not_wait(self) -> None:
        """Let the stream's next read not wait until the socket is readable."""
        if self._stream.reading is not None:
            stop_watcher(self._stream.reading)  # as if there had been input while nobody waited
        self._records += 1
        if self._records >= RECORDS_IN_A_TURN:
            self._records = 0
            self._give_turn()

    def _is_end(self, error: OSError, record: bytes) -> bool:
        """True for the peer's end, False to try the next record; other errors are raised."""
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
        """Give OpenSSL the next record; returns it. At the peer's end, give it that; returns b"".

        Args:
            ahead: read what is behind it, too.

        Raises:
            BlockingIOError: it has not come yet.
        """
        while True:
            held, place = self._held, self._place
            size = _size_of_record(held, place)
            missing = place + size - len(held)
            if missing <= 0:
                break
            if size > RECORD_SIZE:
                # Others as large will follow: read each by itself, so that none has to be put together.
                self._ask_for = size
                ahead = False
            more = self._receive(self._ask_for if ahead else missing)
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
        """OpenSSL has got a record, and nothing to read came of it."""
        now, received = monotonic(), self._stream.bytes_received
        then, received_then = self._forgiven_at
        forgiven = int(now - then) + (received - received_then) // DATA_TO_FORGIVE
        if forgiven:
            self._without_data = max(0, self._without_data - forgiven)
            self._forgiven_at = (now, received)
        self._without_data += 1
        if self._without_data > MAX_RECORDS_WITHOUT_DATA:
            self._end_flood(_kind_of_record(record, self.object.version()))
        # The answer to a key update. Should the kernel not take it, it goes before what is sent next.
        self._try_to_flush()
        self._give_turn()

    def _end_flood(self, kind: str) -> None:
        """Raise, now and at each further read; the connection is reset when it is closed."""
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
        """Let the others go on, unless this is a call that must not wait."""
        stream = self._stream
        if stream.timeout != 0.0 and getcurrent() is not stream.hub:
            gevent.sleep(0)
            if stream.closed:
                raise cancel_wait_ex()

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0) -> int:
        # Hot: the kernel takes it all.
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
            self._undelivered = record  # ENOBUFS, ENOMEM: none of it is to be missing, should the caller go on
            raise
        if sent < len(record):
            self._wait_until_sent(record, sent, size)
        return size

    def _send_large(self, data: memoryview) -> int:
        """``send``, without a way back to the caller after each piece."""
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
        """After a failed write: again, where it waits for the client."""
        while isinstance(error, SSLWantReadError):
            # A handshake message of the client's has come in part.
            self._wait_for_record()
            try:
                return self._write(data)  # type: ignore[no-any-return]
            except OSError as another:
                error = another
        if isinstance(error, SSLZeroReturnError) or is_unannounced_end(error):
            raise BrokenPipeError("the peer has closed the connection") from error
        raise error

    def _deliver(self) -> None:
        """Wait until the kernel has taken what was encrypted; a socket that must not wait: BlockingIOError.

        Should the wait end early, it goes before what is sent next.
        """
        while not self._flush():
            if self._stream.timeout == 0.0:
                raise BlockingIOError
            self._accepted = 0
            self._stream.wait_writable()

    def _flush(self) -> bool:
        """Send what OpenSSL has written; False if the kernel has not taken all of it."""
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
        """Go on with the handshake as far as it goes without waiting. Reads nothing that is behind it.

        Raises:
            SSLWantReadError, SSLWantWriteError: what it waits for.
            TLSFlood: it takes too many records.
            OSError: it has failed.
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
            if self.server_name is None:
                self._hello += record[HEADER:]

    def handshake(self) -> None:
        """Do the handshake, in a greenlet that waits."""
        while True:
            try:
                self.advance_handshake()
                return
            except SSLWantReadError:
                self._stream.wait_readable(True)
            except SSLWantWriteError:
                self._stream.wait_writable()

    def _wait_for_record(self) -> None:
        while True:
            try:
                self._note_without_data(self._feed_record(ahead=False))
                return
            except BlockingIOError:
                if self._stream.timeout == 0.0:
                    raise
            self._stream.wait_readable(True)

    def close_notify(self) -> None:
        """Tell the peer that nothing more comes (RFC 8446 section 6.1), if it can be told without waiting.

        Nothing can be read afterwards.
        """
        if self.broken or self._undelivered:
            return  # a send was broken off: this is no end in order
        try:
            self.object.shutdown()
        except (OSError, ValueError):
            pass  # WantRead: sent, and the peer has not answered yet. Anything else: nobody is left to tell.
        self._try_to_flush()

    def close_notify_and_read_on(self) -> None:
        """As :meth:`close_notify`, for a half-close."""
        stream = self._stream
        # The ssl module calls SSL_shutdown twice, and OpenSSL gives up reading when the second finds application data.
        if self._unread:
            data = self._read(self.object.pending())
            stream.bytes_received += len(data)
            stream.kept += data
            self._unread = False
        self.close_notify()

    def unwrap(self) -> bytes:
        """End TLS and go on in the clear: send close_notify and wait for the peer's; returns what came behind it."""
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
    """Bytes, header included; before the header is whole, the header's. All there is where it is none of TLS's: OpenSSL
    says what is wrong with it."""
    if len(held) - place < HEADER:
        return HEADER
    length = held[place + 3] << 8 | held[place + 4]
    return HEADER + length if held[place + 1] == 3 and length <= MAX_RECORD else len(held) - place


def _kind_of_record(record: bytes, version: str | None) -> str:
    """What a record is that has brought no data: "key_update", "alert", "handshake", "change_cipher_spec", "empty".

    TLS 1.3 encrypts the content type, but the lengths of the first two tell (with one byte of type and 16 of tag), as
    long as nobody pads them: "other".
    """
    content = record[0] if record else 0
    if content != APPLICATION_DATA:
        return _CONTENT.get(content, "other")
    return _LENGTHS.get(len(record) - HEADER, "other") if version == "TLSv1.3" else "empty"
