"""A server with a status page, for a browser."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from kit.patience import SOON
from kit.supervised import COMMAND, wait_until

APP = """
def handle(conn):
    while True:
        with conn.idle():
            data = conn.recv(100)
        if not data:
            return
        if data == b"fault":
            raise RuntimeError("a fault")
        if data == b"stay":
            stay(conn)
        conn.sendall(data)

def stay(conn):
    conn.server.stopping_event.wait(600)
"""


class Service:
    """`gtcpserver serve` with metrics, on a unix socket: whose clients choose what their address is."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "app.py").write_text(APP)
        self.folder = folder
        self.path = folder / "s"
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *COMMAND,
                    "serve",
                    "app:handle",
                    "--bind",
                    f"unix:{self.path}",
                    "--metrics",
                    "127.0.0.1:0",
                    *arguments,
                ],
                cwd=folder,
                stderr=log,
            )
        self.clients: list[socket.socket] = []
        wait_until(lambda: "listening on" in self.log.read_text())
        text = self.log.read_text()
        self.url = text.partition("metrics and status page on ")[2].split()[0]

    def connect(self, name: str = "") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SOON)
        if name:
            client.bind("\0" + name)
        client.connect(str(self.path))
        self.clients.append(client)
        return client

    def ask(self, client: socket.socket, data: bytes = b"hello") -> bytes:
        client.sendall(data)
        return client.recv(100)

    def end(self) -> None:
        for client in self.clients:
            client.close()
        self.process.terminate()
        self.process.wait(SOON)


def text_of(element):
    return f"document.getElementById('{element}').textContent"


#: A client's address, and what a page that takes it for HTML would do with it.
EVIL = "<img src=x onerror=document.title='owned'>"

#: The text of the page with the least contrast to its ground (WCAG 2.1, section 1.4.3).
CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => {
    const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(color).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor, parts = numbers(color);
      if (parts.length < 4 || parts[3] === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = { ratio: 99 };
  for (const node of document.body.querySelectorAll("*")) {
    if (!node.offsetParent || ![...node.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const a = light(getComputedStyle(node).color), b = light(ground(node));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) worst = { ratio, text: node.textContent.slice(0, 40), id: node.id };
  }
  return worst;
})()"""
