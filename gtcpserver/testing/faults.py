"""The faults: client behaviour that harms a server, by accident or on purpose.

Each is a function of a Player, which has the example conversation and makes connections. It plays its part and leaves;
check.py then judges the effect on the server.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from time import monotonic
from typing import Any

from gtcpserver.plural import counted

from .client import Client, connect
from .conversation import Conversation, WrongAnswer, short
from .report import Kind
from .sandbox import Sandbox

#: Most cuts of a long conversation, evenly spread, ends included.
MOST_CUTS = 24

#: Most first bytes sent one by one, each after the server has seen the previous one; the rest follows in as many
#: pieces.
MOST_SINGLE_BYTES = 200

#: Clients that stop in the middle, and clients that stay silent, at once.
STALLED = 6

#: Bytes sent to a handler that does not read them, or that reads without end.
FLOOD = 16 << 20

#: Seconds without a byte taken after which the handler is considered not to read. No flood takes longer than the second
#: figure: a handler that answers a million small requests has shown enough.
NOT_TAKEN = 0.15
LONGEST_FLOOD = 1.0


class Player:
    """Makes connections and plays the conversation for the faults.

    Args:
        sandbox: the Sandbox of the server.
        conversation: the example.
        client_options: options of ``connect``.
        patience: seconds for anything that should happen at once.
        stall_timeout: seconds after which a stalled client loses its connection; None: not checked.
        most_memory: bytes by which a client may make the server's process grow.
        found: called with (kind, text) for each problem seen while a fault is played.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        conversation: Conversation,
        client_options: dict[str, Any],
        patience: float,
        stall_timeout: float | None,
        most_memory: int,
        found: Callable[[Kind, str], None],
    ) -> None:
        self.sandbox = sandbox
        self.conversation = conversation
        self.patience = patience
        self.stall_timeout = stall_timeout
        self.most_memory = most_memory
        self.found = found
        self._client_options = client_options
        self._clients: list[Client] = []

    def connect(self, *, raw: bool = False, **options: Any) -> Client:
        """Return a connected client; ``leave`` closes it.

        Args:
            raw: without PROXY header and TLS.
        """
        usual = {} if raw else self._client_options
        client = connect(self.sandbox.address, timeout=self.patience, **{**usual, **options})
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients.append(client)
        return client

    def leave(self, end: Callable[[Client], None] = Client.close) -> None:
        """Close all open clients."""
        for client in self._clients:
            try:
                end(client)
            except OSError:
                pass  # reset of a closed socket
        self._clients.clear()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Report a wrong answer within the block."""
        try:
            yield
        except WrongAnswer as wrong:
            self.found("conversation", str(wrong))
        except OSError as error:
            self.found("conversation", f"the connection failed: {str(error) or type(error).__name__}")

    def good_client_is_served(self, while_what: str) -> bool:
        """Play the conversation; report a failure."""
        try:
            with self.connect() as client:
                self.conversation.play(client)
        except (WrongAnswer, OSError) as error:
            self.found("not served", f"a good client is not served {while_what}: {str(error) or type(error).__name__}")
            return False
        return True

    def cuts(self, most: int = MOST_CUTS) -> list[int]:
        """Return the lengths to send before a fault: 0, 1 ... all, in ascending order."""
        size = len(self.conversation.sent)
        return sorted({round(i * size / (most - 1)) for i in range(most)}) if size >= most else list(range(size + 1))


def play_as_given(player: Player) -> None:
    with player.expecting():
        player.conversation.play(player.connect())


def send_in_one_segment(player: Player) -> None:
    with player.expecting():
        client = player.connect()
        client.sendall(player.conversation.sent)
        player.conversation.expect_all(client)


def send_byte_by_byte(player: Player) -> None:
    single = MOST_SINGLE_BYTES
    with player.expecting():
        client = player.connect()
        for data, expected in player.conversation.turns:
            pieces = [data[place : place + 1] for place in range(min(single, len(data)))]
            single -= len(pieces)
            rest = data[len(pieces) :]
            step = len(rest) // MOST_SINGLE_BYTES + 1
            pieces += [rest[place : place + step] for place in range(0, len(rest), step)]
            for piece in pieces:
                client.sendall(piece)
                player.sandbox.turn()
            player.conversation.expect(client, expected, data)


def half_close(player: Player) -> None:
    with player.expecting():
        client = player.connect()
        client.sendall(player.conversation.sent)
        client.half_close()
        player.conversation.expect_all(client)
        try:
            client.recv_all()
        except TimeoutError:
            raise WrongAnswer("the connection is not closed after a half-close, when all is answered") from None


def cut(player: Player) -> None:
    for length in player.cuts():
        with player.connect() as client:
            client.sendall(player.conversation.sent[:length])


def reset(player: Player) -> None:
    for length in player.cuts():
        client = player.connect()
        client.sendall(player.conversation.sent[:length])
        # The handler has the bytes and waits for more; or it has answered, and the answer is unread.
        player.sandbox.turn()
        client.reset()
    # Before the server has accepted it, and after the whole conversation.
    player.connect(raw=True).reset()
    client = player.connect()
    try:
        player.conversation.play(client)
    except WrongAnswer:
        pass  # reported where the conversation is played as given
    client.reset()


def leave_answers_unread(player: Player) -> None:
    for end in (Client.reset, Client.close):
        client = player.connect(receive_buffer=4096)
        if player.conversation.sent:
            # Whole conversations back to back: more answers than all buffers hold, if the handler goes on.
            times = max(1, 65536 // len(player.conversation.sent))
            _flood(client, player.conversation.sent * times, FLOOD)
        player.sandbox.turn()
        player.good_client_is_served("while another one does not read")
        end(client)


def say_nothing(player: Player) -> None:
    silent = [player.connect(raw=True) for _ in range(STALLED)]
    player.sandbox.turn()
    player.good_client_is_served(f"while {STALLED} others say nothing")
    _wait_for_stalled(player, silent, [0] * STALLED)


def stall(player: Player) -> None:
    lengths = player.cuts(STALLED)
    clients = []
    for length in lengths:
        client = player.connect()
        client.sendall(player.conversation.sent[:length])
        clients.append(client)
    player.sandbox.turn()
    player.good_client_is_served(f"while {len(clients)} others have stopped in the middle")
    _wait_for_stalled(player, clients, lengths)


def speak_tls_to_it(player: Player) -> None:
    # A handler without TLS gets a hello; one with TLS gets half a hello and then other bytes.
    hello = _client_hello()
    for data in (hello, hello[:40], hello[:5] + Random(1).randbytes(500), b"GET / HTTP/1.1\r\n\r\n"):
        for end in (Client.close, Client.reset):
            client = player.connect(raw=True)
            try:
                client.sendall(data)
            except OSError:
                pass  # refused already
            player.sandbox.turn()
            end(client)


def send_rubbish(player: Player) -> None:
    random = Random(2)
    for piece in (random.randbytes(65536), b"\xff" * 65536, b"a" * 65536):
        before = player.sandbox.look(thorough=False).memory
        client = player.connect()
        sent = _flood(client, piece, FLOOD)
        player.sandbox.turn()
        grown = player.sandbox.look(thorough=False).memory - before
        if grown > player.most_memory:
            player.found(
                "memory",
                f"one client that sent {sent / (1 << 20):.1f} MiB such as {short(piece[:8])} made memory grow by"
                f" {grown / (1 << 20):.1f} MiB",
            )
        client.reset()


def end_the_handlers(player: Player) -> None:
    lengths = player.cuts(4)
    wanted = player.sandbox.look(thorough=False).accepted + len(lengths)
    for length in lengths:
        player.connect().sendall(player.conversation.sent[:length])
    give_up = monotonic() + player.patience
    while player.sandbox.look(thorough=False).accepted < wanted and monotonic() < give_up:
        player.sandbox.turn()
    player.sandbox.turn()
    standing = player.sandbox.kill_handlers()
    if standing:
        player.found(
            "endless handler",
            f"{counted(len(standing), 'handler')} still running when told to end at a stop (GreenletExit):\n"
            + "\n".join(standing),
        )


def _client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    layer = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    try:
        layer.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def _flood(client: Client, piece: bytes, size: int) -> int:
    """Send without reading until ``size`` bytes are sent or the peer stops taking them; return the count."""
    sent = 0
    client.settimeout(NOT_TAKEN)
    give_up = monotonic() + LONGEST_FLOOD
    try:
        while sent < size and monotonic() < give_up:
            client.sendall(piece)
            sent += len(piece)
    except OSError:
        pass  # not taken, or the handler has closed
    return sent


def _wait_for_stalled(player: Player, clients: Sequence[Client], lengths: Sequence[int]) -> None:
    if player.stall_timeout is None:
        return
    give_up = monotonic() + player.stall_timeout + player.patience
    size = len(player.conversation.sent)
    for client, length in zip(clients, lengths, strict=True):
        client.settimeout(max(0.001, give_up - monotonic()))
        try:
            client.recv_all()
        except TimeoutError:
            player.found(
                "stall",
                f"a client that stopped after {length} of {size} bytes still has its connection"
                f" {player.stall_timeout + player.patience:.1f} s later",
            )
        except OSError:
            pass  # closed with a reset


#: Faults by name, in playing order. The last one ends the server.
FAULTS: dict[str, Callable[[Player], None]] = {
    "as given": play_as_given,
    "one segment": send_in_one_segment,
    "byte by byte": send_byte_by_byte,
    "half-close": half_close,
    "cut": cut,
    "reset": reset,
    "unread answers": leave_answers_unread,
    "silence": say_nothing,
    "stall": stall,
    "tls": speak_tls_to_it,
    "rubbish": send_rubbish,
    "end": end_the_handlers,
}
