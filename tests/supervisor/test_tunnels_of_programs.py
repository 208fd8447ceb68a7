"""Programs of the real world whose tunnels move: ssh, and WebSockets. `make moves` has ten reloads and more."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from kit.patience import SOON
from kit.programs import needs
from kit.sshd import PROGRAMS, sshd, through
from kit.supervised import alive

RELOADS = int(os.environ.get("GTCPSERVER_MOVING_RELOADS", "1"))

QUICK = ("--handover", "--probation", "0", "--workers", "1")


def reload(master, moved):
    """Replace the worker, with so many connections, which all move."""
    old = master.settled(1)
    answer = master.ask("reload")
    assert (answer["moved"], answer.get("staying") or {}) == (moved, {})
    master.settled(1)
    assert not any(map(alive, old))


@pytest.mark.slow
@needs(*PROGRAMS)
@pytest.mark.skipif(os.geteuid() != 0, reason="sshd needs root")
def test_a_session_of_ssh_survives_reloads(proxy, tmp_path: Path):
    master = proxy(*QUICK)
    with sshd(tmp_path) as client:
        command = [*client, *through(f"127.0.0.1:{master.port}", "socks5"), "root@127.0.0.1", "cat"]
        session = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            for number in range(RELOADS + 1):
                if number:
                    reload(master, 1)
                said = b"line %d\n" % number
                session.stdin.write(said)
                session.stdin.flush()
                assert session.stdout.readline() == said
            rest, told = session.communicate(timeout=SOON)
            assert (rest, session.returncode) == (b"", 0), told
        finally:
            session.kill()
            session.communicate()
    assert "Traceback" not in master.log()


@pytest.mark.slow
def test_websockets_survive_reloads(proxy):
    aiohttp, aiohttp_socks = pytest.importorskip("aiohttp"), pytest.importorskip("aiohttp_socks")
    web = pytest.importorskip("aiohttp.web")
    master = proxy(*QUICK)
    address = f"127.0.0.1:{master.port}"

    async def echo(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data.upper())
        return socket

    async def talk(url):
        # The first by an HTTP request that the proxy forwards, the second in a tunnel.
        tunnels = aiohttp_socks.ProxyConnector.from_url(f"socks5://{address}")
        async with aiohttp.ClientSession() as one, aiohttp.ClientSession(connector=tunnels) as other:
            sockets = [await one.ws_connect(url, proxy=f"http://{address}"), await other.ws_connect(url)]
            for number in range(RELOADS + 1):
                if number:
                    await asyncio.to_thread(reload, master, 2)
                for socket in sockets:
                    await socket.send_str(f"line {number}")
                    assert await socket.receive_str(timeout=SOON) == f"LINE {number}"
            for socket in sockets:
                await socket.close()
                assert socket.close_code == aiohttp.WSCloseCode.OK

    async def serve_and_talk():
        app = web.Application()
        app.router.add_get("/", echo)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            _, port = runner.addresses[0]
            await talk(f"http://127.0.0.1:{port}/")
        finally:
            await runner.cleanup()

    asyncio.run(serve_and_talk())
    assert "Traceback" not in master.log()
