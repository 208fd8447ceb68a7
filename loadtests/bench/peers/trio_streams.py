"""trio: structured concurrency, a task a connection."""

import math

import trio

from loadtests.bench.peers.common import END_OF_HEAD, announce, answer_maker, host_and_port, options, tls_context

given = options("trio")
answer = answer_maker(given)
keepalive, sleep = given.keepalive, given.sleep / 1000
patience = math.inf if given.timeout is None else given.timeout


async def handle(stream: trio.abc.Stream) -> None:
    rest = b""
    try:
        while True:
            if not rest:
                if given.timeout is None:
                    rest = await stream.receive_some(8192)
                else:
                    with trio.fail_after(patience):
                        rest = await stream.receive_some(8192)
                if not rest:
                    return
            while (end := rest.find(END_OF_HEAD)) < 0:
                more = await stream.receive_some(8192)
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
            keep = keepalive and (b"onnection: close" not in head) and (b" HTTP/1.0\r\n" not in head)
            if sleep:
                await trio.sleep(sleep)
            await stream.send_all(answer(keep))
            if not keep:
                return
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        pass
    finally:
        await trio.aclose_forcefully(stream) if given.tls_cert is None else await close_tls(stream)


async def close_tls(stream: trio.abc.Stream) -> None:
    try:
        with trio.move_on_after(1):
            await stream.aclose()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def main() -> None:
    host, port = host_and_port(given.listen)
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=4096)
    announce(listeners[0].socket.getsockname())
    context = tls_context(given)
    if context is None:
        await trio.serve_listeners(handle, listeners)
    else:
        encrypted = [trio.SSLListener(listener, context, https_compatible=True) for listener in listeners]
        await trio.serve_listeners(handle, encrypted)


trio.run(main)
