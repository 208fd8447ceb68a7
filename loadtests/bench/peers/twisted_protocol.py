"""A Twisted Protocol (callbacks)."""

from typing import Any

from twisted.internet import protocol, reactor, ssl

from loadtests.bench.peers.common import END_OF_HEAD, announce, answer_maker, host_and_port, options

given = options("Twisted")
answer = answer_maker(given)
keepalive, timeout, sleep = given.keepalive, given.timeout, given.sleep / 1000


class Http(protocol.Protocol):
    def connectionMade(self) -> None:
        self.data = b""
        self.timer: Any = None
        self.transport.setTcpNoDelay(True)
        if timeout is not None:
            self.timer = reactor.callLater(timeout, self.transport.abortConnection)

    def dataReceived(self, more: bytes) -> None:
        if self.timer is not None:
            self.timer.reset(timeout)
        rest = self.data + more if self.data else more
        while (end := rest.find(END_OF_HEAD)) >= 0:
            end += 4
            if end == len(rest):
                head, rest = rest, b""
            else:
                head, rest = rest[:end], rest[end:]
            if not head.startswith(b"GET /"):
                self.transport.loseConnection()
                return
            keep = keepalive and (b"onnection: close" not in head) and (b" HTTP/1.0\r\n" not in head)
            if sleep:
                reactor.callLater(sleep, self.answer, keep)
            else:
                self.answer(keep)
            if not keep:
                return
        self.data = rest

    def answer(self, keep: bool) -> None:
        self.transport.write(answer(keep))
        if not keep:
            self.transport.loseConnection()

    def connectionLost(self, reason: Any = None) -> None:
        if self.timer is not None and self.timer.active():
            self.timer.cancel()


factory = protocol.Factory.forProtocol(Http)
host, port = host_and_port(given.listen)
if given.tls_cert is not None:
    context = ssl.DefaultOpenSSLContextFactory(given.tls_key, given.tls_cert)
    listening = reactor.listenSSL(port, factory, context, backlog=4096, interface=host)
else:
    listening = reactor.listenTCP(port, factory, backlog=4096, interface=host)
where = listening.getHost()
announce((where.host, where.port))
reactor.run()
