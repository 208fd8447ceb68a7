"""Which peers are balancers, whose PROXY header is trusted.

Anyone who may send the header can claim any address, so it is only read from listed networks. There it is mandatory: a
balancer that omits it is misconfigured, and guessing would mistake its own address for the client's. Bytes from other
addresses are treated as data, whatever they look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gtcpserver.checks import check_number
from gtcpserver.errors import ConfigError
from gtcpserver.networks import IPNetwork, as_ip, is_in, parse_network


@dataclass(frozen=True)
class ProxyProtocol:
    """Clients connect through balancers that send PROXY headers (HAProxy's PROXY protocol, versions 1 and 2).

    Attributes:
        trusted: networks and addresses of the balancers, such as "10.0.0.0/8"; "unix": connections on a Unix socket.
            These must send a header; others are clients themselves, and send none.
        timeout: seconds within which the header must arrive.

    Raises:
        ConfigError: an invalid network, an empty list, or a timeout that is not positive.

    Example::

        from gtcpserver import ProxyProtocol, Server

        balancers = ProxyProtocol(["10.0.0.0/8", "127.0.0.1"])
        server = Server("127.0.0.1:5000", handle, proxy_protocol=balancers)
    """

    trusted: Sequence[str]
    timeout: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.trusted, str):
            object.__setattr__(self, "trusted", (self.trusted,))
        if not self.trusted:
            raise ConfigError("trusted must name at least one network of balancers, got none")
        networks: list[IPNetwork] = []
        for text in self.trusted:
            if text == "unix":
                continue
            try:
                networks.append(parse_network(text))
            except ValueError as error:
                raise ConfigError(f'trusted must be networks, addresses or "unix", got {text!r} ({error})') from None
        check_number("timeout", self.timeout, above=0)
        object.__setattr__(self, "_networks", tuple(networks))

    def trusts(self, address: Any) -> bool:
        """Return whether a peer, as returned by ``accept``, is a balancer."""
        if not isinstance(address, tuple):
            return "unix" in self.trusted
        networks: tuple[IPNetwork, ...] = self._networks  # type: ignore[attr-defined]
        return is_in(as_ip(address[0]), networks)
