"""Programs that use UDP: DNS and QUIC through an association."""

import asyncio
import socket
import threading
import time

import dns.message
import dns.query
import pytest
import socks as pysocks
import trustme

from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE


@pytest.fixture
def proxied(serve):
    """`proxied()`: a UDP socket whose datagrams go through a proxy. Call in a thread."""
    port = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE))).port

    def make():
        sock = pysocks.socksocket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.set_proxy(pysocks.SOCKS5, "127.0.0.1", port)
        sock.settimeout(SOON)
        return sock

    return make


def test_dns(proxied, dns_server, in_thread):
    dns_server.add("one.test", "A", "192.0.2.1")
    host, _, port = dns_server.address.rpartition(":")

    def ask():
        with proxied() as sock:
            return dns.query.udp(dns.message.make_query("one.test", "A"), host, SOON, int(port), sock=sock)

    assert "192.0.2.1" in str(in_thread(ask).answer[0])


def test_quic(proxied, spawn_thread, in_thread, tmp_path):
    quic = pytest.importorskip("aioquic.quic.connection")
    from aioquic.asyncio import serve as serve_quic
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.events import StreamDataReceived

    ca = trustme.CA()
    issued = ca.issue_cert("quic.test")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    ready, stop, sent = threading.Event(), [], bytes(range(256)) * 400

    async def run():
        config = QuicConfiguration(is_client=False, alpn_protocols=["echo"])
        config.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

        async def echo(reader, writer):
            writer.write(await reader.read())
            writer.write_eof()

        def handle(reader, writer):
            tasks.append(loop.create_task(echo(reader, writer)))

        server = await serve_quic("127.0.0.1", 0, configuration=config, stream_handler=handle)
        loop, tasks, done = asyncio.get_running_loop(), [], asyncio.Event()
        stop.extend([server._transport.get_extra_info("sockname"), lambda: loop.call_soon_threadsafe(done.set)])
        ready.set()
        await done.wait()
        server.close()

    def fetch(address):
        config = QuicConfiguration(is_client=True, alpn_protocols=["echo"], server_name="quic.test")
        config.load_verify_locations(cadata=ca.cert_pem.bytes())
        connection = quic.QuicConnection(configuration=config)
        connection.connect(address, now=time.monotonic())
        connection.send_stream_data(connection.get_next_available_stream_id(), sent, end_stream=True)
        got, ended = b"", False
        with proxied() as sock:
            while not ended:
                for data, _ in connection.datagrams_to_send(now=time.monotonic()):
                    sock.sendto(data, address)
                timer = connection.get_timer()
                sock.settimeout(None if timer is None else max(0.001, timer - time.monotonic()))
                try:
                    connection.receive_datagram(sock.recvfrom(4096)[0], address, now=time.monotonic())
                except TimeoutError:
                    connection.handle_timer(now=time.monotonic())
                while event := connection.next_event():
                    if isinstance(event, StreamDataReceived):
                        got += event.data
                        ended = event.end_stream
        return got

    serving = spawn_thread(asyncio.run, run())
    in_thread(ready.wait, SOON)
    try:
        assert in_thread(fetch, stop[0]) == sent
    finally:
        stop[1]()
        serving.get(timeout=SOON)
