"""Bad clients by the thousand."""

from __future__ import annotations

import contextlib
import socket
import struct

from kit.bad_clients import EVERYTHING
from kit.patience import SOON

#: How many are open at a time.
AT_ONCE = 40


def attack(addresses, connections, at_once=AT_ONCE):
    """Send each of EVERYTHING to each address, again and again.

    A third of them reset, a third close one side, a third just leave.
    """
    number = 0
    while number < connections:
        clients = []
        for _ in range(at_once):
            address = addresses[number % len(addresses)]
            data = EVERYTHING[number // len(addresses) % len(EVERYTHING)]
            client = socket.socket(socket.AF_UNIX if address.startswith("/") else socket.AF_INET)
            client.settimeout(SOON)
            host, _, port = address.rpartition(":")
            with contextlib.suppress(ConnectionResetError):  # by a server that is quicker than we look
                client.connect(address if address.startswith("/") else (host, int(port)))
            with contextlib.suppress(OSError):
                client.sendall(data)
            clients.append(client)
            number += 1
        for place, client in enumerate(clients):
            with contextlib.suppress(OSError):
                if place % 3 == 0:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif place % 3 == 1:
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
            client.close()
