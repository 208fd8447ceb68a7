"""gevent's StreamServer with a blocking handler; ``--pool N`` limits it by a gevent Pool."""

from gevent import get_hub, sleep, ssl
from gevent.pool import Pool
from gevent.server import StreamServer

from loadtests.bench.peers.common import announce, blocking_handler, host_and_port, options, tls_context

given = options("gevent StreamServer", pool={"type": int})
handle = blocking_handler(given, sleep)
context = tls_context(given, ssl)
server = StreamServer(
    host_and_port(given.listen),
    lambda sock, address: handle(sock),
    backlog=4096,
    spawn=Pool(given.pool) if given.pool else "default",
    **({"ssl_context": context} if context else {}),
)
# wrk leaves in the middle of handshakes: a hundred tracebacks a run, which would be measured too.
get_hub().exception_stream = None
server.start()
announce(server.address)
server.serve_forever()
