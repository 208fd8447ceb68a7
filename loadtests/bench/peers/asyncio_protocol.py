"""An asyncio Protocol (callbacks); with ``--uvloop`` on uvloop. The idle timeout is one timer a connection."""

import asyncio
from typing import Any

from loadtests.bench.peers.common import END_OF_HEAD, announce, answer_maker, host_and_port, options, tls_context

given = options("asyncio Protocol", uvloop={"action": "store_true"})
keepalive = given.keepalive
answer = answer_maker(given)
sleep = given.sleep / 1000
timeout = given.timeout


class Http(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.write = transport.write
        self.data = b""
        if timeout is not None:
            self.loop = asyncio.get_running_loop()
            self.last = self.loop.time()
            self.timer = self.loop.call_later(timeout, self.look)

    def look(self) -> None:
        left = self.last + timeout - self.loop.time()
        if left <= 0:
            self.transport.abort()
        else:
            self.timer = self.loop.call_later(left, self.look)

    def data_received(self, more: bytes) -> None:
        if timeout is not None:
            self.last = self.loop.time()
        rest = self.data + more if self.data else more
        while (end := rest.find(END_OF_HEAD)) >= 0:
            end += 4
            if end == len(rest):
                head, rest = rest, b""
            else:
                head, rest = rest[:end], rest[end:]
            if not head.startswith(b"GET /"):
                self.transport.close()
                return
            keep = keepalive and (b"onnection: close" not in head) and (b" HTTP/1.0\r\n" not in head)
            if sleep:
                asyncio.get_running_loop().call_later(sleep, self.answer, keep)
            else:
                self.write(answer(keep))
                if not keep:
                    self.transport.close()
            if not keep:
                return
        self.data = rest

    def answer(self, keep: bool) -> None:
        self.write(answer(keep))
        if not keep:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if timeout is not None:
            self.timer.cancel()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(
        Http, *host_and_port(given.listen), backlog=4096, ssl=tls_context(given)
    )
    announce(server.sockets[0].getsockname())
    await server.serve_forever()


if given.uvloop:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
