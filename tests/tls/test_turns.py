"""Several TLS records at once: their events, and the turns that others get meanwhile."""

import socket

import gevent
from gevent.event import Event
from gevent.hub import get_hub

from gtcpserver.connection.tls_layer import RECORDS_IN_A_TURN
from kit.patience import SOON
from kit.waiting import wait_until


def test_input_that_comes_while_a_record_is_held_is_not_missed(serve, tls, memory_client):
    """Its event is one with that of the record that is held."""
    received, conns, goes_on = [], [], Event()

    def handle(conn):
        conns.append(conn)
        for _ in range(2):
            received.append(conn.recv(100))
        goes_on.wait(SOON)
        received.extend((conn.recv(100), conn.recv(100)))

    server = serve(handle, tls=tls)
    client = memory_client(server)
    wait_until(lambda: conns and conns[0].stream.reader())
    client.sock.sendall(client.records(b"0"))
    wait_until(lambda: received and conns[0].stream.reader())
    client.sock.sendall(client.records(b"1", b"2"))
    wait_until(lambda: len(received) == 2)
    client.sock.sendall(client.records(b"3"))
    gevent.sleep(0.02)  # its event has been fetched
    goes_on.set()
    wait_until(lambda: len(received) == 4)
    assert received == [b"0", b"1", b"2", b"3"]


def test_a_kill_while_others_have_their_turn_loses_no_data(serve, tls, memory_client):
    number = 3 * RECORDS_IN_A_TURN
    received, thrown = [], []

    def handle(conn):
        me, loop = gevent.getcurrent(), get_hub().loop
        conn.recv(1)
        while len(received) < number:
            callback = loop.run_callback(me.throw, KeyError)
            try:
                received.append(conn.recv(1))
            except KeyError:
                thrown.append(True)
            finally:
                callback.stop()

    server = serve(handle, tls=tls)
    client = memory_client(server)
    messages = [bytes([i % 256]) for i in range(number)]
    client.sock.sendall(client.records(b"x", *messages))
    client.sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: not server.active_connections)
    assert thrown
    assert received == messages
