"""Which peers are balancers, whose PROXY header is believed.

Whoever may write the header may claim any address, so it is read from listed networks alone. From those it is wanted:
a balancer that has forgotten it is a mistake, and guessing would make its own address the client's. What others send is
theirs from the first byte on, whatever it looks like.
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
    """Clients come by balancers that tell who they are (HAProxy's PROXY protocol, versions 1 and 2).

    Attributes:
        trusted: networks and addresses of the balancers, such as "10.0.0.0/8"; "unix": those that come by a unix
            socket. From these a header must come; others are clients of their own, and send none.
        timeout: seconds in which the header must have come.

    Raises:
        ConfigError: a network that is none, none at all, or a time-out that cannot be.
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
        """Whether a peer, as ``accept`` names it, is a balancer."""
        if not isinstance(address, tuple):
            return "unix" in self.trusted
        networks: tuple[IPNetwork, ...] = self._networks  # type: ignore[attr-defined]
        return is_in(as_ip(address[0]), networks)
