"""check_faults: play an example conversation with faults, and check what the handler leaks."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent

from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.errors import ConfigError
from gtcpserver.plural import counted
from gtcpserver.proxy_protocol.header import ProxyHeader
from gtcpserver.signatures import ConnectionT, Handler

from .client import Client
from .conversation import Conversation, Turn, WrongAnswer
from .faults import FAULTS, Player
from .report import FaultReport, Kind, Problem
from .sandbox import Blocked, Died, Look, Sandbox

if TYPE_CHECKING:
    from typing_extensions import Unpack, overload  # which type checkers have

    from gtcpserver.connection.connection import Connection
    from gtcpserver.signatures import ServerOptions

MANY_CONNECTIONS = "many connections"

#: Connections in a batch, and batches; pieces of memory are compared between batches.
BATCH, BATCHES = 80, 4

#: Pieces of memory (mostly Python objects) that each connection of the last batches may leave. A leak leaves at least
#: one; caches that fill up, and the interpreter itself, leave one occasionally.
MOST_PIECES = 0.9

#: Seconds that descriptors and greenlets have to disappear after their connection.
GRACE = 0.3

#: Repetitions of a fault that seems to leak: a connection pool that fills up does not grow each time.
REPEATS = 2

#: Problems after which no more faults are played: each may use up the whole patience, and one fix may solve several.
ENOUGH_PROBLEMS = 5

_LEAKS: tuple[Kind, ...] = ("descriptors", "greenlets")

if TYPE_CHECKING:
    # For type checkers the handler and the hooks take connections of connection_class.
    @overload
    def check_faults(
        handler: Handler[Connection],
        conversation: Iterable[Turn],
        *,
        leave_out: Collection[str] = ...,
        patience: float = ...,
        stall_timeout: float | None = ...,
        max_memory_growth: int = ...,
        client_tls: ssl.SSLContext | None = ...,
        client_proxy: ProxyHeader | str | None = ...,
        **options: Unpack[ServerOptions],
    ) -> FaultReport: ...
    @overload
    def check_faults(
        handler: Handler[ConnectionT],
        conversation: Iterable[Turn],
        *,
        leave_out: Collection[str] = ...,
        patience: float = ...,
        stall_timeout: float | None = ...,
        max_memory_growth: int = ...,
        client_tls: ssl.SSLContext | None = ...,
        client_proxy: ProxyHeader | str | None = ...,
        connection_class: type[ConnectionT],
        **options: Unpack[ServerOptions[ConnectionT]],
    ) -> FaultReport: ...


def check_faults(
    handler: Handler[Any],
    conversation: Iterable[Turn],
    *,
    leave_out: Collection[str] = (),
    patience: float = 10.0,
    stall_timeout: float | None = None,
    max_memory_growth: int = 8 << 20,
    client_tls: ssl.SSLContext | None = None,
    client_proxy: ProxyHeader | str | None = None,
    **options: Any,
) -> FaultReport:
    r"""Play a conversation with a handler, with every client fault, and report the problems and leaks.

    The server runs in a separate process, forked from this one: the handler's effects there (on a store, say) are not
    visible here. Takes some seconds.

    Args:
        handler: as Server.
        conversation: what a good client sends and expects: (bytes, bytes or compiled pattern) pairs. The same server
            gets it repeatedly, so the answers must be the same each time.
        leave_out: names of FAULTS that do not apply to this protocol: "one segment" if a client must wait for an answer
            before it goes on; "half-close" if it means that the client wants no more answers.
        patience: seconds in which the handler must answer, or end after its client left.
        stall_timeout: seconds after which a client that went silent must have lost its connection; None: it may keep
            it.
        max_memory_growth: bytes that the server's memory may grow by, in total and through one client's data.
        client_tls: context of the clients, for a server with ``tls``.
        client_proxy: PROXY header of the clients, for a server with ``proxy_protocol``; as for ``connect``.
        **options: as Server (``timeout``, ``pool``, ``tls`` ...).

    Returns:
        The report: ``assert report.ok, report``.

    Raises:
        ConfigError: an invalid argument, of this function or of Server.

    Example::

        from gtcpserver.testing import check_faults

        def test_faults():
            report = check_faults(echo, [(b"hello\n", b"hello\n")], timeout=1)
            assert report.ok, report
    """
    check_number("patience", patience, above=0)
    check_number("stall_timeout", stall_timeout, above=0, none="if clients may keep their connections")
    check_whole_number("max_memory_growth", max_memory_growth, least=0)
    if isinstance(leave_out, str) or (unknown := set(leave_out) - {*FAULTS, MANY_CONNECTIONS}):
        given = leave_out if isinstance(leave_out, str) else ", ".join(sorted(unknown))
        raise ConfigError(f"leave_out must be a list of {', '.join([*FAULTS, MANY_CONNECTIONS])}; got {given!r}")
    turns = Conversation(conversation)
    client_options: dict[str, Any] = {}
    if client_tls is not None:
        client_options["tls"] = client_tls
    if client_proxy is not None:
        client_options["proxy"] = client_proxy
    with Sandbox(handler, options, patience) as sandbox:
        check = _Check(sandbox, turns, client_options, patience, stall_timeout, max_memory_growth)
        return check.run(leave_out)


class _Check:
    def __init__(
        self,
        sandbox: Sandbox,
        conversation: Conversation,
        client_options: dict[str, Any],
        patience: float,
        stall_timeout: float | None,
        most_memory: int,
    ) -> None:
        self._sandbox = sandbox
        self._conversation = conversation
        self._patience = patience
        self._most_memory = most_memory
        self._player = Player(sandbox, conversation, client_options, patience, stall_timeout, most_memory, self._found)
        self._problems: list[Problem] = []
        self._played: list[str] = []
        self._fault = ""
        self._before: Look | None = None
        self._leaking: set[Kind] = set()  # reported once: the first fault that shows a leak is the simplest
        self._stuck = 0  # connections known not to end

    def run(self, leave_out: Collection[str]) -> FaultReport:
        began = monotonic()
        first = last = None
        try:
            if self._warm_up():
                first = last = self._before
                for name, function in FAULTS.items():
                    if name == "end" and MANY_CONNECTIONS not in leave_out:
                        self._fault = MANY_CONNECTIONS
                        self._serve_many()
                        self._played.append(self._fault)
                    self._fault = name
                    if name in leave_out:
                        continue
                    if not self._play(function):
                        break
                    self._played.append(name)
                last = self._look()
        except Blocked as blocked:
            self._found("blocked", f"the event loop stands still, for all clients, here:\n{blocked}")
        except Died as died:
            self._found("died", str(died))
        finally:
            self._player.leave()
        growth = last.memory - first.memory if first is not None and last is not None else 0
        if growth > self._most_memory:
            self._found("memory", f"memory grew by {growth / (1 << 20):.1f} MiB in all")
        accepted = last.accepted if last is not None else 0
        return FaultReport(tuple(self._problems), tuple(self._played), accepted, growth, monotonic() - began)

    def _found(self, kind: Kind, text: str) -> None:
        problem = Problem(self._fault, kind, text)
        if problem not in self._problems:
            self._problems.append(problem)

    def _warm_up(self) -> bool:
        """Play it unmodified first, so that one-time allocations do not count as leaks. False if it fails."""
        self._fault = "as given"
        for _ in range(3):
            FAULTS["as given"](self._player)
            self._player.leave()
        self._before = self._settled()
        return not self._problems

    def _play(self, function: Callable[[Player], None]) -> bool:
        """Play one fault and judge the result; False if going on is useless."""
        before, stuck = self._before, self._stuck
        assert before is not None
        try:
            function(self._player)
        except OSError as error:
            # The server may refuse: the next step checks whether it still serves.
            self._found("not served", f"a client could not connect or send: {str(error) or type(error).__name__}")
        self._player.leave()
        after = self._settled()
        for kind in _LEAKS:
            grown = getattr(after, kind) - getattr(before, kind)
            # Leftovers of handlers that do not end are already reported.
            if grown > 0 and kind not in self._leaking and self._stuck == stuck:
                after = self._repeat(function, kind, grown)
        self._before = after
        return self._player.good_client_is_served("afterwards") and len(self._problems) < ENOUGH_PROBLEMS

    def _repeat(self, function: Callable[[Player], None], kind: Kind, grown: int) -> Look:
        steps = [grown]
        for _ in range(REPEATS):
            self._before = before = self._look()
            function(self._player)
            self._player.leave()
            after = self._settled()
            steps.append(getattr(after, kind) - getattr(before, kind))
        if min(steps) > 0:
            self._leaking.add(kind)
            self._found(kind, f"{kind} stay: {min(steps)} more each time this is done")
        return after

    def _settled(self) -> Look:
        """Look at the server after the connections ended, or should have, and had time to release resources."""
        give_up = monotonic() + self._patience
        while (look := self._look(thorough=False)).open > self._stuck and monotonic() < give_up:
            gevent.sleep(0.002)
        if look.active > self._stuck:
            where = "\n".join(look.where[self._stuck :][:5])
            self._found(
                "endless handler",
                f"{counted(look.active - self._stuck, 'handler')} still running {self._patience:.1f} s "
                f"after the client left:\n{where}",
            )
        self._stuck = max(self._stuck, look.open)
        look = self._look()
        give_up = monotonic() + GRACE
        while self._has_grown(look) and monotonic() < give_up:
            gevent.sleep(0.01)
            look = self._look()
        return look

    def _has_grown(self, look: Look) -> bool:
        before = self._before
        return before is not None and any(
            getattr(look, kind) > getattr(before, kind) for kind in _LEAKS if kind not in self._leaking
        )

    def _look(self, thorough: bool = True) -> Look:
        """Look at the server. Each error appears in one look only, so each look notes them."""
        look = self._sandbox.look(thorough)
        for error in look.errors:
            self._found("handler error", error)
        return look

    def _serve_many(self) -> None:
        """Make many short connections, so that what each of them leaks adds up."""
        pieces = []
        for _ in range(BATCHES):
            for number in range(BATCH):
                self._connect_once(number)
            pieces.append(self._settled().blocks)
        steps = [(after - before) / BATCH for before, after in pairwise(pieces)]
        if min(steps) > MOST_PIECES:
            self._found("memory", f"each connection leaves about {min(steps):.0f} objects behind")
        self._before = self._look()

    def _connect_once(self, number: int) -> None:
        sent = self._conversation.sent
        try:
            client = self._player.connect()
            if number % 4 == 0:
                self._conversation.play(client)
            else:
                client.sendall(sent[: number * 7 % (len(sent) + 1)])
        except (OSError, WrongAnswer):
            pass  # already reported
        self._player.leave(Client.close if number % 2 else Client.reset)
