"""gevent_stream.py with one import changed: gtcpserver's StreamServer."""

from gevent import sleep, ssl
from gevent.pool import Pool

from gtcpserver import StreamServer
from loadtests.bench.peers.common import announce, blocking_handler, host_and_port, options, tls_context

given = options("gtcpserver StreamServer", pool={"type": int})
handle = blocking_handler(given, sleep)
context = tls_context(given, ssl)
server = StreamServer(
    host_and_port(given.listen),
    lambda sock, address: handle(sock),
    backlog=4096,
    spawn=Pool(given.pool) if given.pool else "default",
    **({"ssl_context": context} if context else {}),
)
server.start()
announce(server.address)
server.serve_forever()
