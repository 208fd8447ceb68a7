"""Connections move between two servers over real sockets, and every side sees what it should."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import struct
import time

import gevent
import pytest
from gevent import socket as gevent_socket
from gevent import ssl as gevent_ssl

from gtcpserver import ClientLimits, ConfigError, Connection, HandedOver, ProxyProtocol, TLSConfig
from gtcpserver.handover import messages, mover, sender
from gtcpserver.handover.mover import Mover
from gtcpserver.tls import self_signed
from kit.handing import Taker, join, leave, mover_of
from kit.patience import SOON
from kit.waiting import wait_until


class Lines:
    """A handler that counts the lines of each connection in its session, and notes how its runs end."""

    def __init__(self, name, before=None):
        self.name = name
        self.ends = []
        self.connections = []
        self.before = before

    def __call__(self, conn):
        self.connections.append(conn)
        conn.session.setdefault("lines", 0)
        try:
            while True:
                with conn.idle():
                    try:
                        line = conn.recv_until(b"\n")
                    except EOFError:
                        self.ends.append("eof")
                        return
                if self.before is not None:
                    self.before(conn, line)
                conn.session["lines"] += 1
                answer = f"{self.name} {conn.session['lines']} {line.decode().strip()} {conn.resumed}\n"
                conn.sendall(answer.encode())
        except Exception as error:
            self.ends.append(error)
            raise
        except HandedOver:
            self.ends.append("moved")
            raise


class Unprintable(bytes):
    def decode(self, *_):
        raise ValueError("no text")


@pytest.fixture
def two(serve):
    """`two(**options)`: two servers with `handover`, and their handlers."""

    def make(**options):
        handlers = Lines("a"), Lines("b")
        return [serve(handler, handover=True, **options) for handler in handlers] + list(handlers)

    return make


@pytest.fixture
def client():
    clients = []

    def connect(server, source=None):
        sock = gevent_socket.create_connection(("127.0.0.1", server.port), SOON, source)
        sock.settimeout(SOON)
        clients.append(sock)
        return sock

    yield connect
    for one in clients:
        one.close()


@pytest.fixture
def offered(two, client):
    """`offered()`: a connection that was offered to a new worker.

    It returns the old server, its handler, the client, the new worker, and the number of the offer.
    """

    def make():
        server, _, handler, _ = two()
        sock = client(server)
        ask(sock)
        taker = Taker(server)
        server.mover.leave()
        (number,) = taker.offered()
        return server, handler, sock, taker, number

    return make


def ask(sock, line=b"x\n"):
    sock.sendall(line)
    return answer(sock)


def answer(sock):
    data = b""
    while not data.endswith(b"\n"):
        more = sock.recv(4096)
        if not more:
            raise EOFError(data)
        data += more
    return data.decode()


def test_an_idle_connection_moves_with_its_session(two, client):
    a, b, at_a, _at_b = two()
    sock = client(a)
    assert ask(sock) == "a 1 x False\n"
    leave(a, b)
    wait_until(lambda: b.active_connections)
    assert ask(sock) == "b 2 x True\n"
    assert at_a.ends == ["moved"]
    assert a.active_connections == 0


def test_what_belongs_to_a_connection_goes_along(two, client):
    a, b, at_a, at_b = two(timeout=17)
    sock = client(a)
    ask(sock)
    before = at_a.connections[0]
    before.settimeout(3.5)
    before.log_fields["user"] = {"name": "ada"}
    facts = (before.client_address, before.peer_address, before.accepted_at, before.bytes_received, before.bytes_sent)
    leave(a, b)
    wait_until(lambda: at_b.connections)
    (after,) = at_b.connections
    assert facts == (
        *(after.client_address, after.peer_address, after.accepted_at),
        *(after.bytes_received, after.bytes_sent),
    )
    assert (after.timeout, after.log_fields, after.server, after.resumed) == (3.5, {"user": {"name": "ada"}}, b, True)
    assert after.started_at == pytest.approx(before.started_at, abs=0.01)


def test_each_connection_counts_once(two, client):
    a, b, _, _ = two()
    sock = client(a)
    ask(sock)
    received = a.stats().bytes_received
    leave(a, b)
    wait_until(lambda: b.active_connections and not a.active_connections)
    before, after = a.stats(), b.stats()
    assert (before.accepted, after.accepted) == (1, 0)
    assert (before.moved, before.taken_over, after.moved, after.taken_over) == (1, 0, 0, 1)
    assert (before.bytes_received, after.bytes_received) == (received, 0)
    assert ask(sock, b"12345\n") == "b 2 12345 True\n"
    assert b.stats().bytes_received == 6


def test_hooks_are_called_once(serve, client, access_records):
    calls = []

    def hooks(name):
        return {
            "on_connect": lambda conn: calls.append(("connect", name)),
            "on_disconnect": lambda conn: calls.append(("disconnect", name)),
        }

    a = serve(Lines("a"), handover=True, access_log="text", **hooks("a"))
    b = serve(Lines("b"), handover=True, access_log="text", **hooks("b"))
    sock = client(a)
    ask(sock)
    leave(a, b)
    wait_until(lambda: b.active_connections and not a.active_connections)
    ask(sock)
    sock.close()
    wait_until(lambda: not b.active_connections)
    assert calls == [("connect", "a"), ("disconnect", "b")]
    (record,) = access_records()
    assert (record.access["result"], record.access["bytes_received"]) == ("ok", 4)


def test_a_request_that_comes_in_the_moment_of_the_move_is_answered(two, client):
    a, b, _, _ = two()
    sock = client(a)
    ask(sock)
    sock.sendall(b"at the same time\n")
    leave(a, b)  # neither server's loop has run since
    assert answer(sock) == "b 2 at the same time True\n"


def test_a_busy_connection_moves_at_its_next_idle_point(serve, client):
    go_on = gevent.event.Event()
    a = serve(Lines("a", before=lambda conn, line: go_on.wait()), handover=True)
    b = serve(Lines("b"), handover=True)
    sock = client(a)
    sock.sendall(b"long\n")
    wait_until(lambda: a.stats().handlers)
    leave(a, b, stop=True)
    wait_until(lambda: a.mover.staying() == {"busy": 1})
    go_on.set()
    assert answer(sock) == "a 1 long False\n"
    assert ask(sock) == "b 2 x True\n"
    assert a.wait_stopped(SOON)


def test_requests_read_ahead_go_along(serve, client):
    go_on = gevent.event.Event()
    a = serve(Lines("a", before=lambda conn, line: go_on.wait()), handover=True)
    b = serve(Lines("b"), handover=True)
    sock = client(a)
    sock.sendall(b"one\ntwo\nthree\nfo")
    wait_until(lambda: a.stats().handlers)
    leave(a, b, stop=True)
    go_on.set()
    assert answer(sock) == "a 1 one False\n"
    sock.sendall(b"ur\n")
    answers = ""
    while answers.count("\n") < 3:
        answers += answer(sock)
    assert answers == "b 2 two True\nb 3 three True\nb 4 four True\n"


def test_a_request_that_has_begun_is_finished_where_it_began(two, client):
    a, b, _, _ = two()
    sock = client(a)
    ask(sock)
    sock.sendall(b"begi")
    wait_until(lambda: a.stats().bytes_received == 6)
    leave(a, b, stop=True)
    wait_until(lambda: a.mover.staying() == {"busy": 1})
    assert ask(sock, b"n\n") == "a 2 begin False\n"
    assert ask(sock) == "b 3 x True\n"


def test_a_connection_that_waits_for_its_turn_is_served_meanwhile(two, client):
    a, b, _, _ = two()
    sock = client(a)
    ask(sock)
    mover_of(a).leave()  # before there is a line
    gevent.spawn(a.stop, None)
    for number in (2, 3, 4):
        assert ask(sock) == f"a {number} x False\n"
    join(a, b)
    wait_until(lambda: b.active_connections)
    assert ask(sock) == "b 5 x True\n"


def test_connections_end_as_before_without_handover(serve, client):
    a = serve(Lines("a"))
    sock = client(a)
    ask(sock)
    assert a.moving is None
    gevent.spawn(a.stop, SOON)
    assert sock.recv(10) == b""


# -- handlers that do what they should not -----------------------------------------------------------------------------


def test_nothing_that_a_handler_writes_after_the_move_reaches_the_client(serve, client):
    errors = []

    def stubborn(conn):
        while True:
            try:
                with conn.idle():
                    conn.recv(100)
            except BaseException as error:
                errors.append(type(error))
                for send in (lambda: conn.sendall(b"no"), lambda: conn.send(b"no"), lambda: conn.shutdown(2)):
                    with pytest.raises(OSError):
                        send()
                conn.close()
                return

    a = serve(stubborn, handover=True)
    b = serve(Lines("b"), handover=True)
    sock = client(a)
    wait_until(lambda: a.stats().idle)
    leave(a, b)
    wait_until(lambda: b.active_connections)
    assert ask(sock) == "b 1 x True\n"
    assert errors == [HandedOver]
    assert a.stats().handler_errors == 0


def test_a_handler_that_goes_on_after_the_move_meets_a_closed_connection(serve, client):
    seen = []

    def deaf(conn):
        for _ in range(2):
            try:
                with conn.idle():
                    seen.append(conn.recv(100))
            except BaseException as error:
                seen.append(type(error).__name__)

    a = serve(deaf, handover=True)
    b = serve(Lines("b"), handover=True)
    client(a)
    wait_until(lambda: a.stats().idle)
    leave(a, b)
    wait_until(lambda: not a.active_connections)
    assert seen[0] == "HandedOver"
    assert len(seen) == 2


def test_another_handler_may_write_to_a_connection_that_is_offered(offered):
    _, at_a, sock, taker, number = offered()
    at_a.connections[0].sendall(b"news\n")
    assert taker.hear().withdrawn == [number]
    assert answer(sock) == "news\n"
    taker.say(ready=[number])  # too late
    assert ask(sock) == "a 2 x False\n"


def test_a_connection_closed_by_another_handler_while_offered_is_closed(offered):
    a, at_a, sock, taker, _ = offered()
    at_a.connections[0].close()
    taker.die()
    assert sock.recv(10) == b""
    wait_until(lambda: not a.active_connections)
    (end,) = at_a.ends
    assert isinstance(end, OSError)


def test_a_timeout_while_offered_is_raised(serve, client):
    def patient(conn):
        with conn.idle():
            try:
                conn.recv(100)
            except TimeoutError:
                conn.sendall(b"too late\n")

    a = serve(patient, handover=True, timeout=0.3)
    sock = client(a)
    wait_until(lambda: a.stats().idle)
    taker = Taker(a)
    a.mover.leave()
    taker.offered()
    assert answer(sock) == "too late\n"  # once the offer is withdrawn, as nobody answers it


def test_a_handler_killed_while_offered_ends_here(offered):
    a, _, sock, taker, number = offered()
    (handler,) = a.connections().values()
    handler.kill()
    taker.say(ready=[number])
    taker.die()
    assert sock.recv(10) == b""
    assert not a.active_connections


# -- new workers that refuse, hang or die ------------------------------------------------------------------------------


def test_a_refused_connection_is_served_on_and_offered_again(offered, monkeypatch):
    monkeypatch.setattr(mover, "AGAIN_SECONDS", 0.05)
    monkeypatch.setitem(sender.PAUSING, "full", 0.01)
    _, at_a, sock, taker, number = offered()
    taker.say(refused=[(number, "full")])
    assert ask(sock) == "a 2 x False\n"
    assert taker.offered() == [number + 1]
    assert at_a.ends == []


def test_an_offer_that_is_not_answered_is_withdrawn(offered, monkeypatch):
    monkeypatch.setattr(sender, "OFFER_SECONDS", 0.05)
    _, _, sock, taker, number = offered()
    sock.sendall(b"meanwhile\n")
    assert taker.hear().withdrawn == [number]
    assert answer(sock) == "a 2 meanwhile False\n"


def test_a_new_worker_that_dies_before_go_changes_nothing(offered):
    _, at_a, sock, taker, _ = offered()
    sock.sendall(b"meanwhile\n")
    taker.die()
    assert answer(sock) == "a 2 meanwhile False\n"
    assert at_a.ends == []


def test_a_new_worker_that_dies_after_go_gives_the_connection_back(two, client):
    a, _, _at_a, _ = two()
    sock = client(a)
    ask(sock)
    taker = Taker(a)
    a.mover.leave()
    taker.say(ready=taker.offered())
    assert len(taker.hear().go) == 1
    sock.sendall(b"meanwhile\n")
    taker.die()
    assert answer(sock) == "a 2 meanwhile True\n"  # the handler began anew
    assert (a.stats().moved, a.active_connections) == (0, 1)


def test_a_dead_old_worker_takes_only_what_it_had_not_given_away(two, client):
    _, b, _, _at_b = two()
    pairs = [gevent_socket.socketpair() for _ in range(2)]
    mine, theirs = gevent_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mover_of(b).receive_on(theirs.detach())
    state = {"client": ["127.0.0.1", 1], "accepted_at": 0.0, "received": 0, "sent": 0, "timeout": None}
    state["kind"] = [1, 1, 0]
    fds = struct.pack("=2i", *(there.fileno() for _, there in pairs))
    offers = messages.encode_offers([(0, state), (1, state)])
    mine.sendmsg([offers], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    assert messages.decode(mine.recv(1000)).ready == [0, 1]
    mine.send(messages.encode(go=[1]))
    for _, there in pairs:
        there.close()
    mine.close()
    assert pairs[0][0].recv(10) == b""
    assert ask(pairs[1][0]) == "b 1 x True\n"


@pytest.mark.parametrize(
    "packet",
    [b"{", b"[]", b'{"version":1,"offer":[[0]]}', b'{"version":1,"offer":[[-1,{}]]}', b'{"version":1,"go":[true]}'],
)
def test_a_malformed_packet_is_ignored(two, packet):
    _, b, _, _ = two()
    mine, theirs = gevent_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mover_of(b).receive_on(theirs.detach())
    here, there = socket.socketpair()
    mine.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", there.fileno()))])
    there.close()
    here.settimeout(SOON)
    gevent.sleep(0.01)
    assert here.recv(1) == b""  # its copy is closed
    here.close()
    mine.close()


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b'{"version":2,"offer":[[5,"another form"]]}', "version"),
        (messages.encode_offers([(5, {})]), "state"),
        (messages.encode_offers([(5, {"kind": [1, 1, 0], "timeout": []})]), "state"),
    ],
)
def test_an_offer_that_cannot_be_read_is_refused(two, packet, reason):
    _, b, _, _ = two()
    mine, theirs = gevent_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mover_of(b).receive_on(theirs.detach())
    here, there = socket.socketpair()
    mine.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", there.fileno()))])
    there.close()
    assert messages.decode(mine.recv(1000)).refused == [(5, reason)]
    here.settimeout(SOON)
    assert here.recv(1) == b""
    here.close()
    mine.close()
    assert b.active_connections == 0


def test_a_stop_waits_until_the_new_worker_serves(two, client):
    a, _, _, _ = two()
    ask(client(a))
    taker = Taker(a)
    a.mover.leave()
    gevent.spawn(a.stop, None)
    (number,) = taker.offered()
    taker.say(ready=[number])
    assert taker.hear().go == [number]
    assert not a.active_connections
    assert not a.wait_stopped(0.1)
    taker.say(serving=[number])
    assert a.wait_stopped(SOON)
    taker.die()


def test_a_stop_waits_for_connections_that_come(two, client):
    _, b, _, at_b = two()
    here, there = gevent_socket.socketpair()
    mine, theirs = gevent_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mover_of(b).receive_on(theirs.detach())
    state = {"client": ["127.0.0.1", 1], "accepted_at": 0.0, "received": 5, "sent": 0, "timeout": None}
    offers = messages.encode_offers([(0, state | {"kind": [1, 1, 0]})])
    mine.sendmsg([offers], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", there.fileno()))])
    there.close()
    assert messages.decode(mine.recv(1000)).ready == [0]
    gevent.spawn(b.stop, None)
    assert not b.wait_stopped(0.1)
    mine.send(messages.encode(go=[0]))
    assert here.recv(10) == b""  # ended as idle
    assert b.wait_stopped(SOON)
    assert at_b.ends == ["eof"]
    mine.close()


# -- limits of the new worker ------------------------------------------------------------------------------------------


def test_a_full_pool_refuses_until_there_is_room(serve, client, monkeypatch):
    monkeypatch.setattr(mover, "AGAIN_SECONDS", 0.05)
    monkeypatch.setitem(sender.PAUSING, "full", 0.01)
    go_on = gevent.event.Event()
    a = serve(Lines("a"), handover=True)
    b = serve(Lines("b", before=lambda conn, line: go_on.wait()), handover=True, pool=1)
    other, sock = client(b), client(a)
    other.sendall(b"long\n")
    wait_until(b.pool.full)
    ask(sock)
    leave(a, b)
    wait_until(lambda: a.mover.staying() == {"refused": 1})
    assert ask(sock) == "a 2 x False\n"
    go_on.set()
    answer(other)
    wait_until(lambda: not a.active_connections)
    assert ask(sock) == "b 3 x True\n"


def test_max_connections_of_the_new_worker_hold(serve, client, monkeypatch):
    a = serve(Lines("a"), handover=True)
    b = serve(Lines("b"), handover=True, max_connections=2)
    socks = [client(a) for _ in range(4)]
    for sock in socks:
        ask(sock)
    leave(a, b)
    wait_until(lambda: b.active_connections == 2)
    assert sorted(ask(sock)[0] for sock in socks) == ["a", "a", "b", "b"]


def test_client_limits_count_a_connection_once(serve, client):
    limits = [ClientLimits(connections=2, new_per_second=1, burst=3) for _ in range(2)]
    a, b = (serve(Lines(name), handover=True, client_limits=one) for name, one in zip("ab", limits, strict=True))
    socks = [client(a), client(a)]
    for sock in socks:
        ask(sock)
    leave(a, b)
    wait_until(lambda: b.active_connections == 2)
    assert (limits[0].counted, limits[1].counted) == (0, 1)
    with pytest.raises(ConnectionResetError):
        client(b).recv(1)
    for sock in socks:
        ask(sock)
        sock.close()
    wait_until(lambda: not limits[1].counted)


def test_a_client_that_the_new_worker_denies_drains(serve, client):
    a = serve(Lines("a"), handover=True)
    b = serve(Lines("b"), handover=True, client_limits=ClientLimits(deny=["127.0.0.1"]))
    sock = client(a)
    ask(sock)
    leave(a, b, stop=True)
    assert sock.recv(10) == b""


def test_the_last_descriptors_stay_free(two, client, monkeypatch):
    a, b, _, _ = two()
    sock = client(a)
    ask(sock)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    leave(a, b)
    wait_until(lambda: a.mover.staying() == {"refused": 1})
    assert ask(sock) == "a 2 x False\n"


# -- shares, of a worker that stays ------------------------------------------------------------------------------------


def test_a_worker_gives_only_its_share(two, client):
    a, b, _, _ = two()
    socks = [client(a) for _ in range(5)]
    for sock in socks:
        ask(sock)
    told = []
    giver = Mover(a, when_shared=lambda: told.append(a.moving.moved))
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mover_of(b).receive_on(here.detach())
    giver.send_on(there.detach(), share=3)
    wait_until(lambda: told)
    assert told == [3]
    assert sorted(ask(sock)[0] for sock in socks) == ["a", "a", "b", "b", "b"]
    assert giver.staying() == {}


def test_a_share_that_a_dead_worker_should_have_stays(two, client):
    a, _, _, _ = two()
    sock = client(a)
    ask(sock)
    told = []
    giver = Mover(a, when_shared=lambda: told.append(a.moving.moved))
    mine, theirs = gevent_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    giver.send_on(theirs.detach(), share=3)
    mine.close()
    wait_until(lambda: told)
    assert told == [0]
    assert ask(sock) == "a 2 x False\n"


# -- what stays --------------------------------------------------------------------------------------------------------


def test_a_session_takes_json_values_only(two, client):
    a, b, at_a, _ = two()
    ask(client(a))
    session = at_a.connections[0].session
    for change in (
        lambda: session.__setitem__("a", object()),
        lambda: session.update(a={1, 2}),
        lambda: session.setdefault("a", b"bytes"),
        lambda: session.__setitem__("a", float("nan")),
        lambda: session.__setitem__(1, "a"),
        lambda: session.__ior__({"a": object()}),
    ):
        with pytest.raises(TypeError, match="session"):
            change()
    session |= {"list": [1, {"a": None}], "text": "\udcff\u20ac"}
    leave(a, b)
    wait_until(lambda: b.active_connections)
    (after,) = b.connections()
    assert after.session == {"lines": 1, "list": [1, {"a": None}], "text": "\udcff\u20ac"}


def test_a_session_that_became_unwritable_stays_and_is_finished(two, client, caplog):
    a, b, at_a, _ = two()
    sock = client(a)
    ask(sock)
    session = at_a.connections[0].session
    session["list"] = []
    session["list"].append(object())
    leave(a, b, stop=True)
    assert sock.recv(10) == b""  # ended as idle, in order
    wait_until(lambda: at_a.ends)
    assert at_a.ends == ["eof"]
    assert "a session cannot be handed over, its connection stays" in caplog.text


def test_a_session_that_is_too_large_is_finished_where_it_is(two, client):
    a, b, at_a, _ = two()
    sock = client(a)
    ask(sock)
    at_a.connections[0].session["large"] = "x" * messages.MAX_STATE
    leave(a, b, stop=True)
    assert sock.recv(10) == b""
    wait_until(lambda: at_a.ends == ["eof"])


def test_a_tls_connection_stays_and_drains(serve):
    made = self_signed()
    tls = TLSConfig(made.certfile, made.keyfile)
    a, b = (serve(Lines(name), handover=True, tls=tls) for name in "ab")
    context = gevent_ssl.SSLContext(gevent_ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, gevent_ssl.CERT_NONE
    sock = context.wrap_socket(gevent_socket.create_connection(("127.0.0.1", a.port), SOON))
    assert ask(sock) == "a 1 x False\n"
    join(a, b)
    a.mover.leave()
    assert a.mover.staying() == {"tls": 1}
    gevent.spawn(a.stop, None)
    assert sock.recv(10) == b""
    sock.close()


def test_an_open_file_of_makefile_stays(serve, client):
    def reads_file(conn):
        with conn.makefile("rb") as lines, conn.idle():
            lines.readline()

    a, b = (serve(reads_file, handover=True) for _ in range(2))
    client(a)
    wait_until(lambda: a.stats().idle)
    leave(a, b)
    assert a.mover.staying() == {"makefile": 1}


def test_a_connection_that_another_greenlet_reads_stays(serve, client):
    def delegates(conn):
        def read():
            with conn.idle():
                conn.recv(10)

        gevent.spawn(read).join()

    a, b = (serve(delegates, handover=True) for _ in range(2))
    client(a)
    wait_until(lambda: a.stats().idle)
    leave(a, b)
    assert a.mover.staying() == {"another greenlet": 1}


# -- what the client does meanwhile ------------------------------------------------------------------------------------


def test_a_client_that_has_ended_its_side_gets_its_answers(two, client):
    a, b, _, at_b = two()
    sock = client(a)
    ask(sock)
    sock.sendall(b"last\n")
    sock.shutdown(socket.SHUT_WR)
    leave(a, b)
    assert answer(sock) == "b 2 last True\n"
    assert sock.recv(10) == b""
    assert at_b.ends == ["eof"]


def test_a_reset_connection_ends_in_one_place(two, client):
    a, b, _at_a, _at_b = two()
    sock = client(a)
    ask(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    leave(a, b)
    wait_until(lambda: not (a.active_connections or b.active_connections))
    assert a.stats().resets + b.stats().resets == 1


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_many_connections_move_in_batches(two, client, need_descriptors):
    count = 2 * sender.MOST_UNDER_WAY + 7
    need_descriptors(8 * count)
    a, b, _, _ = two()
    socks = [client(a) for _ in range(count)]
    for sock in socks:
        ask(sock)
    before = len(os.listdir("/proc/self/fd"))
    leave(a, b, stop=True)
    assert a.wait_stopped(SOON)
    wait_until(lambda: b.active_connections == count)
    assert all(ask(sock) == "b 2 x True\n" for sock in socks)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the line
    report = a.stop()
    assert (report.finished, report.ended) == (0, 0)


def test_a_chain_of_moves_keeps_the_session(serve, client):
    servers = [serve(Lines(name), handover=True) for name in "abcd"]
    sock = client(servers[0])
    ask(sock)
    for before, after in itertools.pairwise(servers):
        leave(before, after, stop=True)
        assert before.wait_stopped(SOON)
    assert ask(sock) == "d 2 x True\n"


def test_a_new_worker_that_leaves_itself_refuses(serve, client, monkeypatch):
    monkeypatch.setattr(mover, "AGAIN_SECONDS", 0.05)
    monkeypatch.setitem(sender.PAUSING, "full", 0.01)
    a, b, c = (serve(Lines(name), handover=True) for name in "abc")
    held = client(b)
    ask(held)
    leave(b, c, stop=True)
    sock = client(a)
    ask(sock)
    leave(a, b)
    gevent.sleep(0.06)
    assert ask(sock) == "a 2 x False\n"
    join(a, c)
    wait_until(lambda: not a.active_connections)
    assert ask(sock) == "c 3 x True\n"


def test_a_stop_without_a_line_ends_idle_connections_after_a_while(two, client, monkeypatch):
    monkeypatch.setattr(mover, "PATIENCE_SECONDS", 0.1)
    a, _, at_a, _ = two()
    sock = client(a)
    ask(sock)
    mover_of(a).leave()
    gevent.spawn(a.stop, None)
    assert sock.recv(10) == b""
    assert at_a.ends == ["eof"]


def test_the_time_of_a_stop_ends_connections_that_nobody_takes(two, client):
    a, _, _, _ = two()
    sock = client(a)
    ask(sock)
    Taker(a)
    a.mover.leave()
    began = time.monotonic()
    a.stop(0.1)
    assert sock.recv(10) == b""
    assert time.monotonic() - began < SOON


def test_a_stop_in_a_hurry_ends_what_nobody_takes(two, client):
    a, _, _, _ = two()
    sock, other = client(a), client(a)
    ask(sock)
    ask(other)
    taker = Taker(a)
    a.mover.leave()
    gevent.spawn(a.stop, None)
    first, second = taker.offered()
    taker.say(refused=[(first, "full")])
    assert ask(sock) == "a 2 x False\n"
    a.hasten(SOON)
    assert sock.recv(10) == b""
    taker.say(refused=[(second, "full")])  # the last try
    assert other.recv(10) == b""
    assert a.wait_stopped(SOON)
    taker.die()


def test_a_forked_child_has_no_end_of_a_line(two, client):
    a, _, _, _ = two()
    ask(client(a))
    taker = Taker(a)
    a.mover.leave()
    taker.offered()
    assert a.mover.serves()
    assert ends_of_lines() == 2  # one of them the test's, which the child keeps
    pid = os.fork()
    if not pid:
        os._exit(10 * a.mover.serves() + ends_of_lines())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert a.mover.serves()
    taker.die()


def ends_of_lines():
    """Return how many sockets of this process are of the kind that lines are."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            found += (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return found


def test_a_state_that_cannot_be_written_stays(two, client):
    a, b, at_a, _ = two()
    sock = client(a)
    ask(sock)
    at_a.connections[0].client_address = Unprintable()
    leave(a, b, stop=True)
    assert sock.recv(10) == b""
    assert b.active_connections == 0


def test_a_balancers_header_goes_along(serve):
    proxy = ProxyProtocol(["127.0.0.1"])
    a, b = (serve(Lines(name), handover=True, proxy_protocol=proxy) for name in "ab")
    sock = gevent_socket.create_connection(("127.0.0.1", a.port), SOON)
    sock.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 50000 5000\r\n")
    ask(sock)
    leave(a, b)
    wait_until(lambda: b.active_connections)
    (after,) = b.connections()
    assert after.client_address == ("192.0.2.1", 50000)
    assert after.peer_address == sock.getsockname()
    assert after.proxy_header is not None
    assert after.proxy_header.version == 1
    sock.close()


def test_a_unix_socket_moves(serve, tmp_path):
    a, b = (serve(Lines(name), f"unix:{tmp_path}/{name}", handover=True) for name in "ab")
    sock = gevent_socket.socket(socket.AF_UNIX)
    sock.connect(f"{tmp_path}/a")
    ask(sock)
    leave(a, b)
    wait_until(lambda: b.active_connections)
    assert ask(sock) == "b 2 x True\n"
    sock.close()


def test_a_class_of_the_programs_is_used(serve, client):
    class Own(Connection):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.made = True

        __slots__ = ("made",)

    a = serve(Lines("a"), handover=True)
    b = serve(Lines("b"), handover=True, connection_class=Own)
    sock = client(a)
    ask(sock)
    leave(a, b)
    wait_until(lambda: b.active_connections)
    (after,) = b.connections()
    assert isinstance(after, Own)
    assert after.made
    assert ask(sock) == "b 2 x True\n"


def test_the_handler_timeout_counts_the_time_before_the_move(serve, client):
    a, b = (serve(Lines(name), handover=True, handler_timeout=30) for name in "ab")
    sock = client(a)
    ask(sock)
    gevent.sleep(1.1)  # a look at the handlers, of which there is one a second
    leave(a, b)
    wait_until(lambda: b.active_connections)
    (after,) = b.connections()
    assert a.moving is not None
    assert 28 < b.moving.state_of(after)["handler_left"] < 29.5


def test_a_handover_must_be_a_bool(serve):
    with pytest.raises(ConfigError, match="handover must be True or False, got 1"):
        serve(Lines("a"), handover=1)
