"""Redis servers of tests, and stores in this process that ask them."""

import os
import signal
import subprocess
import time

from gtcpserver.store.settings import StoreSettings
from gtcpserver.store.store import Store, limits_of

from .patience import SOON
from .ports import free_port
from .supervised import state_of
from .waiting import wait_for_port


class RedisServer:
    """A redis-server, which keeps nothing on disk, or a sentinel."""

    def __init__(self, folder, *options, port=None, config="save ''\n"):
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._options = options
        self._config = folder / f"redis{self.port}.conf"
        self._config.write_text(config)
        self.start()

    def start(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = ["redis-server", str(self._config), "--bind", "127.0.0.1", "--port", str(self.port), *self._options]
        self.process = subprocess.Popen(command, cwd=self._folder, **quiet)
        wait_for_port(self.port, self.process)

    def ask(self, *words, password=None):
        """Run redis-cli, and return what it prints."""
        login = ["-a", password, "--no-auth-warning"] if password else []
        command = ["redis-cli", "-p", str(self.port), *login, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=SOON).stdout.strip()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def pause(self):
        os.kill(self.process.pid, signal.SIGSTOP)
        while state_of(self.process.pid) != "T":
            time.sleep(0.001)

    def go_on(self):
        os.kill(self.process.pid, signal.SIGCONT)


def started(url, **options):
    """Return a store that has tried to connect."""
    store = Store(StoreSettings(url=url, **options))
    store.start()
    return store


def open_of(name, most=3):
    """Return the demands of a client that may have some connections."""
    return limits_of(name, most, None, 1, ("client_connections", "client_rate"))


def rate_of(name, rate, burst):
    """Return the demands of a client that may come as often."""
    return limits_of(name, None, rate, burst, ("client_connections", "client_rate"))
