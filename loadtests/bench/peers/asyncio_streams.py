"""asyncio streams; with ``--uvloop`` on uvloop."""

import asyncio

from loadtests.bench.peers.common import END_OF_HEAD, announce, answer_maker, host_and_port, options, tls_context

given = options("asyncio streams", uvloop={"action": "store_true"})
answer = answer_maker(given)


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    rest = b""
    try:
        while True:
            if not rest:
                read = reader.read(8192)
                rest = await (read if given.timeout is None else asyncio.wait_for(read, given.timeout))
                if not rest:
                    return
            while (end := rest.find(END_OF_HEAD)) < 0:
                more = await reader.read(8192)
                if not more:
                    return
                rest += more
            end += 4
            if end == len(rest):
                head, rest = rest, b""
            else:
                head, rest = rest[:end], rest[end:]
            if not head.startswith(b"GET /"):
                return
            keep = given.keepalive and (b"onnection: close" not in head) and (b" HTTP/1.0\r\n" not in head)
            head = b""
            if given.sleep:
                await asyncio.sleep(given.sleep / 1000)
            writer.write(answer(keep))
            await writer.drain()
            if not keep:
                return
    except (OSError, asyncio.TimeoutError):
        pass
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(handle, *host_and_port(given.listen), backlog=4096, ssl=tls_context(given))
    announce(server.sockets[0].getsockname())
    await server.serve_forever()


if given.uvloop:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
