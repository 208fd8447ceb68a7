"""Tunnels move between servers over real sockets: nothing is lost, no end is missed, no time begins anew."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import socket

import gevent
import pytest
from gevent import ssl as gevent_ssl
from gevent.pool import Pool

from gtcpserver import HandedOver, TLSConfig, connect, relay
from gtcpserver.connection.tunnels import relay_of
from gtcpserver.forwarder import Forwarder
from gtcpserver.tls import self_signed
from gtcpserver.transfer import PIPES
from kit.handing import Taker, close_lines, join, leave
from kit.tunnels import Destination, Reader, read, read_all, relaying, reset
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_pipe_is_left", "impatient")

LOT = 8 << 20

#: Random schedules in each run of the suite; `make move-schedules` has 10,000.
SCHEDULES = int(os.environ.get("GTCPSERVER_MOVE_SCHEDULES", "25"))


@pytest.fixture
def destination():
    one = Destination()
    yield one
    one.sock.close()


@pytest.fixture
def opened(destination):
    """`opened(server, **options)`: a tunnel through a server, closed after the test."""
    made = []

    def make(server, **options):
        made.append(destination.tunnel(server, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def several(serve, destination):
    """`several(n, **options)`: servers that relay to the destination and can go on with each other's tunnels."""

    def make(count=2, results=None, **options):
        handler = relaying(destination.address, results, **options)
        return [serve(handler, handover=True) for _ in range(count)]

    return make


def moves(giver, taker):
    """Move the one tunnel of a server."""
    taken = taker.stats().taken_over
    leave(giver, taker)
    wait_until(lambda: taker.stats().taken_over == taken + 1 and not giver.active_connections)


# -- what moves --------------------------------------------------------------------------------------------------------


def test_an_idle_tunnel_moves_and_counts_once(serve, destination, opened, access_records):
    results = []
    handler = relaying(destination.address, results)
    a, b = (serve(handler, handover=True, access_log="text") for _ in "ab")
    tunnel = opened(a)
    assert tunnel.talks()
    moves(a, b)
    assert tunnel.talks()
    tunnel.client.shutdown(socket.SHUT_WR)
    assert read_all(tunnel.far) == b""
    tunnel.far.close()
    assert read_all(tunnel.client) == b""
    (result,) = wait_until(lambda: results)
    assert (result.bytes_a_to_b, result.bytes_b_to_a, result.reason) == (16, 16, "closed")
    (record,) = access_records()
    assert (record.access["result"], record.access["bytes_received"], record.access["bytes_sent"]) == ("ok", 16, 16)
    before, after = a.stats(), b.stats()
    assert (before.moved, before.bytes_received, after.taken_over, after.bytes_received) == (1, 8, 1, 8)
    assert before.handler_errors == after.handler_errors == 0


@pytest.mark.parametrize("side", ["client", "far"])
def test_a_half_closed_tunnel_moves_and_its_other_half_goes_on(several, opened, side):
    a, b = several()
    tunnel = opened(a)
    assert tunnel.talks()
    ends, goes_on = (tunnel.client, tunnel.far) if side == "client" else (tunnel.far, tunnel.client)
    ends.shutdown(socket.SHUT_WR)
    assert read_all(goes_on) == b""
    moves(a, b)
    goes_on.sendall(b"later")
    assert read(ends, 5) == b"later"
    goes_on.close()
    assert read_all(ends) == b""
    wait_until(lambda: not b.active_connections)


@pytest.mark.parametrize("pace", [None, lambda direction, size: 0.0], ids=["plain", "paced"])
@pytest.mark.parametrize("size", [100_000, LOT], ids=["little", "much"])
@pytest.mark.parametrize("end", [False, True], ids=["open", "ended"])
def test_bytes_under_way_go_along(several, opened, pace, size, end):
    a, b = several(pace=pace)
    tunnel = opened(a)
    data = random.randbytes(size)
    sending = gevent.spawn(tunnel.client.sendall, data)
    answer = gevent.spawn(tunnel.far.sendall, data[::-1])
    gevent.sleep(0.05)  # until nothing moves any more: nobody reads
    moves(a, b)
    if end:
        gevent.spawn(lambda: (sending.get(), tunnel.client.shutdown(socket.SHUT_WR)))
    assert read(tunnel.far, size) == data
    assert read(tunnel.client, size) == data[::-1]
    answer.get()
    if end:
        assert read_all(tunnel.far) == b""
    else:
        assert tunnel.talks()


@pytest.mark.parametrize("pace", [None, lambda direction, size: 0.0], ids=["plain", "paced"])
def test_a_tunnel_at_full_speed_moves_along_a_chain(several, opened, pace):
    servers = several(4, pace=pace)
    tunnel = opened(servers[0])
    ends = gevent.event.Event()
    sent, got = hashlib.sha256(), hashlib.sha256()

    def send():
        while not ends.is_set():
            piece = random.randbytes(65_536)
            sent.update(piece)
            tunnel.client.sendall(piece)
        tunnel.client.shutdown(socket.SHUT_WR)

    def receive():
        while piece := tunnel.far.recv(1 << 20):
            got.update(piece)

    both = [gevent.spawn(send), gevent.spawn(receive)]
    for giver, taker in itertools.pairwise(servers):
        gevent.sleep(0.02)
        moves(giver, taker)
    ends.set()
    gevent.joinall(both, raise_error=True)
    assert got.digest() == sent.digest()


def test_a_tunnel_that_begins_in_a_worker_that_leaves_moves_at_once(several, opened, monkeypatch):
    monkeypatch.setattr("gtcpserver.handover.mover.AGAIN_SECONDS", 3600)
    a, b = several()
    leave(a, b)
    tunnel = opened(a)
    wait_until(lambda: b.stats().taken_over == 1 and not a.active_connections)
    assert tunnel.talks()
    assert [server.stats().tunnels for server in (a, b)] == [0, 1]


def test_the_forwarder_counts_a_tunnel_where_it_is(serve, destination, opened):
    handlers = [Forwarder([destination.address], balance="least") for _ in "ab"]
    a, b = (serve(handler, handover=True) for handler in handlers)
    tunnel = opened(a)
    assert [handler.targets[0].active for handler in handlers] == [1, 0]
    moves(a, b)
    assert [handler.targets[0].active for handler in handlers] == [0, 1]
    assert tunnel.talks()


def test_a_tunnel_whose_target_was_removed_goes_on(serve, destination, opened):
    a = serve(Forwarder([destination.address]), handover=True)
    b = serve(Forwarder(["127.0.0.1:1"]), handover=True)
    tunnel = opened(a)
    moves(a, b)
    assert tunnel.talks()


def test_a_tunnel_between_unix_sockets_moves(serve, tmp_path):
    far = serve(lambda conn: conn.sendall(conn.recv_exactly(5)[::-1]), f"unix:{tmp_path}/far")
    a, b = (serve(Forwarder([far.address]), f"unix:{tmp_path}/{name}", handover=True) for name in "ab")
    with connect(a.address) as client:
        wait_until(lambda: far.active_connections)
        moves(a, b)
        client.sendall(b"hello")
        assert read_all(client) == b"olleh"


# -- times -------------------------------------------------------------------------------------------------------------


def times_of(server):
    """Return when the relay of the one tunnel of a server began, when it moved bytes, and when its times are over."""
    (conn,) = server.connections()
    found = vars(relay_of(conn))
    return tuple(found[name] for name in ("_began", "moved_at", "_idle_timeout", "_lives_until"))


@pytest.mark.parametrize("half_closed", [False, True])
def test_times_go_along(several, opened, half_closed):
    servers = several(3, idle_timeout=60, half_closed_timeout=50, lifetime=70)
    tunnel = opened(servers[0])
    assert tunnel.talks()
    if half_closed:
        tunnel.client.shutdown(socket.SHUT_WR)
        assert read_all(tunnel.far) == b""
    began, moved_at, timeout, lives_until = times_of(servers[0])
    assert timeout == (50 if half_closed else 60)
    assert lives_until == pytest.approx(began + 70)
    for giver, taker in itertools.pairwise(servers):
        moves(giver, taker)
        assert times_of(taker) == (began, moved_at, timeout, began + 70)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"idle_timeout": 0.3}, "idle"),
        ({"idle_timeout": 60, "half_closed_timeout": 0.3}, "half_closed"),
        ({"lifetime": 0.3}, "lifetime"),
    ],
    ids=["idle", "half_closed", "lifetime"],
)
def test_the_times_of_the_new_worker_end_a_tunnel(several, serve, destination, opened, limits, reason):
    results = []
    (a,) = several(1)
    b = serve(relaying(destination.address, results, **limits), handover=True)
    tunnel = opened(a)
    assert tunnel.talks()
    tunnel.client.shutdown(socket.SHUT_WR)
    assert read_all(tunnel.far) == b""
    moves(a, b)
    (result,) = wait_until(lambda: results)
    assert (result.reason, result.duration >= 0.29) == (reason, True)


def test_a_paced_tunnel_rests_on_after_a_move(several, opened):
    a, b = several(pace=lambda direction, size: 0.3)
    tunnel = opened(a)
    tunnel.client.sendall(b"x")
    assert read(tunnel.far, 1) == b"x"
    began = gevent.get_hub().loop.now()
    tunnel.client.sendall(b"y")
    moves(a, b)
    assert read(tunnel.far, 1) == b"y"
    assert gevent.get_hub().loop.now() - began > 0.2


# -- what stays --------------------------------------------------------------------------------------------------------


def stays(giver, taker):
    leave(giver, taker, stop=True)
    return wait_until(lambda: giver.mover.staying())


def test_a_tunnel_with_tls_stays(serve, destination):
    made = self_signed()
    tls = TLSConfig(made.certfile, made.keyfile)
    a, b = (serve(relaying(destination.address), handover=True, tls=tls) for _ in "ab")
    context = gevent_ssl.SSLContext(gevent_ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, gevent_ssl.CERT_NONE
    with context.wrap_socket(gevent.socket.create_connection(("127.0.0.1", a.port))) as client:
        far = destination.sock.accept()[0]
        assert stays(a, b) == {"tls": 1}
        client.sendall(b"x")
        assert far.recv(1) == b"x"
        far.close()


@pytest.mark.parametrize(
    ("relayed", "why"),
    [
        (lambda conn, other: relay(conn, other), "relay without handover"),
        (lambda conn, other: gevent.spawn(relay, conn, other, handover=True).get(), "another greenlet"),
        (lambda conn, other: (other.dup(), relay(conn, other, handover=True)), "shared"),
        (lambda conn, other: relay(conn, gevent.socket.socket(fileno=other.detach()), handover=True), "socket"),
    ],
    ids=["no handover", "greenlet", "shared", "socket"],
)
def test_what_stays_is_said(serve, destination, opened, relayed, why):
    def handle(conn):
        with connect(destination.address) as other:
            relayed(conn, other)

    a, b = (serve(handle, handover=True) for _ in "ab")
    tunnel = opened(a)
    assert tunnel.talks()
    assert stays(a, b) == {why: 1}
    assert tunnel.talks()


def test_a_tunnel_within_a_deadline_stays(serve, destination, opened):
    def handle(conn):
        with connect(destination.address) as other, conn.deadline(60):
            relay(conn, other, handover=True)

    a, b = (serve(handle, handover=True) for _ in "ab")
    tunnel = opened(a)
    assert tunnel.talks()
    assert stays(a, b) == {"deadline": 1}
    assert tunnel.talks()


def test_a_full_worker_takes_no_tunnel(serve, destination, opened):
    a, b = (serve(relaying(destination.address), handover=True, pool=1) for _ in "ab")
    mine, other = opened(a), opened(b)
    leave(a, b, stop=True)
    wait_until(lambda: a.mover.staying() == {"refused": 1})
    assert mine.talks()
    other.close()
    wait_until(lambda: b.stats().taken_over == 1)
    assert mine.talks()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture
def offered(several, opened):
    """`offered(**options)`: a tunnel with bytes under way both ways that was offered to a new worker."""

    def make(**options):
        (server,) = several(1, **options)
        tunnel = opened(server)
        tunnel.data = random.randbytes(LOT)
        gevent.spawn(tunnel.client.sendall, tunnel.data)
        gevent.spawn(tunnel.far.sendall, tunnel.data)
        gevent.sleep(0.05)
        taker = Taker(server)
        server.mover.leave()
        (number,) = taker.offered()
        return server, tunnel, taker, number

    return make


def has_all(tunnel):
    return read(tunnel.far, LOT) == tunnel.data == read(tunnel.client, LOT)


PACES = pytest.mark.parametrize("pace", [None, lambda direction, size: 0.0], ids=["plain", "paced"])


@PACES
@pytest.mark.parametrize("end", ["refuses", "dies", "dies after ready", "dies after go"])
def test_a_new_worker_that_does_not_serve_changes_nothing(offered, end, pace):
    _, tunnel, taker, number = offered(pace=pace)
    if end == "refuses":
        taker.say(refused=[(number, "state")])
    elif end == "dies after ready":
        taker.say(ready=[number])
    elif end == "dies after go":
        taker.say(ready=[number])
        assert taker.hear().go == [number]
    if end != "refuses":
        taker.die()
    assert has_all(tunnel)
    assert tunnel.talks()


def test_a_new_worker_that_does_not_answer_in_time_is_told(offered, monkeypatch):
    monkeypatch.setattr("gtcpserver.handover.sender.OFFER_SECONDS", 0.2)
    _, tunnel, taker, number = offered()
    assert taker.hear().withdrawn == [number]
    assert has_all(tunnel)


def test_a_tunnel_that_is_killed_while_offered_is_reset(offered):
    server, tunnel, taker, number = offered()
    (worker,) = server.moving._state.connections.values()  # noqa: SLF001
    worker.kill()
    assert taker.hear().withdrawn == [number]
    taker.die()
    with pytest.raises(ConnectionResetError):
        read_all(tunnel.client)
    with pytest.raises(ConnectionResetError):
        read_all(tunnel.far)


@pytest.mark.parametrize("which", [0, 1])
def test_a_tunnel_that_is_closed_while_offered_ends(serve, destination, opened, which):
    sides = []

    def handle(conn):
        with connect(destination.address) as other:
            sides.extend((conn, other))
            relay(conn, other, handover=True)

    server = serve(handle, handover=True)
    tunnel = opened(server)
    taker = Taker(server)
    server.mover.leave()
    (number,) = taker.offered()
    sides[which].close()
    taker.say(ready=[number])
    assert taker.hear().withdrawn == [number]
    taker.die()
    with pytest.raises(ConnectionResetError):
        read_all(tunnel.far if which == 0 else tunnel.client)
    wait_until(lambda: not server.active_connections)


def test_a_handler_that_does_not_go_on_with_the_relay_resets_both_sides(several, serve, opened):
    (a,) = several(1)
    b = serve(lambda conn: None, handover=True)
    tunnel = opened(a)
    leave(a, b)
    for side in (tunnel.client, tunnel.far):
        with pytest.raises(ConnectionResetError):
            read_all(side)


def test_the_old_handler_sees_the_move_and_cannot_write(serve, destination, opened):
    seen = []

    def handle(conn):
        with conn.relayed_to or connect(destination.address) as other:
            try:
                relay(conn, other, handover=True)
            except HandedOver:
                seen.append("moved")
                for side in (conn, other):
                    with pytest.raises(OSError):
                        side.sendall(b"no")
                raise

    a, b = (serve(handle, handover=True) for _ in "ab")
    tunnel = opened(a)
    moves(a, b)
    assert seen == ["moved"]
    assert tunnel.talks()
    assert a.stats().handler_errors == 0


def test_without_a_pipe_bytes_under_way_keep_a_tunnel_for_now(several, opened, monkeypatch):
    monkeypatch.setattr(PIPES, "take", lambda: None)
    a, b = several(small=True)
    tunnel = opened(a, small=True)
    assert tunnel.talks()
    data = random.randbytes(LOT)
    gevent.spawn(tunnel.client.sendall, data)
    (conn,) = a.connections()
    wait_until(lambda: relay_of(conn).flows[0].waits_for() is not conn)
    gevent.sleep(0.05)  # until the other side takes no more
    leave(a, b, stop=True)
    wait_until(lambda: a.mover.staying() == {"refused": 1})
    assert read(tunnel.far, LOT) == data
    wait_until(lambda: b.active_connections)
    assert tunnel.talks()


def test_two_servers_that_leave_do_not_pass_a_tunnel_to_and_fro(several, opened):
    a, b = several()
    tunnel = opened(a)
    assert tunnel.talks()
    leave(b, a)
    leave(a, b)
    gevent.sleep(0.2)  # hundreds of moves
    assert tunnel.talks()
    assert (a.stats().moved, b.stats().moved) == (0, 0)


# -- random schedules --------------------------------------------------------------------------------------------------


class Side(Reader):
    """One end of a tunnel: what it has sent, and has been sent by the other."""

    def __init__(self, sock):
        super().__init__(sock)
        self.sent = bytearray()
        self.ended = False

    def write(self, size):
        if not self.ended:
            data = random.randbytes(size)
            with contextlib.suppress(BlockingIOError):
                self.sent += data[: self.sock.send(data)]

    def end(self):
        if not self.ended:
            self.ended = True
            self.sock.shutdown(socket.SHUT_WR)

    def learns_of_reset(self, other):
        try:
            self.read_all()
        except ConnectionError:
            return True
        assert other.ended or not self.heard_end, "an end in order"
        assert other.sent.startswith(self.got)
        return self.heard_end


def move_at_random(seed, servers, tunnel):
    """Move a tunnel along servers while its ends write, read and end at random; check that each gets all of the other's
    bytes in order, or a reset of it."""
    choose = random.Random(seed)
    sides = Side(tunnel.client), Side(tunnel.far)
    here = 0
    for _ in range(choose.randint(5, 40)):
        side = choose.choice(sides)
        what = choose.random()
        if what < 0.4:
            side.write(choose.choice((1, 100, 70_000, 1 << 20)))
        elif what < 0.7:
            side.read(choose.choice((1, 1000, 1 << 20)))
        elif what < 0.75:
            side.end()
        elif what < 0.9 and here + 1 < len(servers):
            join(servers[here], servers[here + 1])
            servers[here].mover.leave()
            here += 1
        else:
            gevent.sleep(choose.choice((0, 0, 0.001)))
    broken = choose.choice((None, None, 0, 1))
    if broken is not None:
        reset(sides[broken].sock)
        join(servers[here], servers[-1])  # at the same time
        servers[here].mover.leave()
        wait_until(lambda: sides[1 - broken].learns_of_reset(sides[broken]))
        sides[1 - broken].sock.close()  # after an end in order, a relay only writes to that side
        return
    for side in sides:
        side.end()
    wait_until(lambda: sides[0].read_all() & sides[1].read_all())
    assert (sides[0].got, sides[1].got) == (sides[1].sent, sides[0].sent)


@PACES
def test_random_schedules(serve, pace):
    # At the same time: they mostly wait for small windows to open.
    Pool(25).map(lambda seed: run_schedule(seed, serve, Destination(), pace), range(SCHEDULES))


def run_schedule(seed, serve, destination, pace):
    handlers = [relaying(destination.address, small=True, swapped=bool(seed & bit), pace=pace) for bit in (1, 2, 4, 8)]
    servers = [serve(handler, handover=True) for handler in handlers]
    tunnel = destination.tunnel(servers[0], small=True)
    try:
        assert tunnel.talks()
        move_at_random(seed, servers, tunnel)
        wait_until(lambda: not any(server.active_connections for server in servers))
    except BaseException as error:
        raise AssertionError(f"schedule {seed}: {error!r}") from error
    finally:
        tunnel.close()
        destination.sock.close()
    for server in servers:
        assert server.stats().handler_errors == 0
        server.halt()
        close_lines(server)
