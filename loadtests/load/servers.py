"""The servers that the locustfile's users talk to, each a process of its own."""

from __future__ import annotations

from ..local_servers import LocalServers

#: Servers that users need -> what speaks the protocol here.
SERVERS = {
    "echo_server": "gtcpserver echo",
    "tls_server": "examples/tls_echo.py",
    "line_server": "examples/line_protocol.py",
    "http_server": "examples/http_server.py",
    "proxy_server": "gtcpserver proxy",
}


def start_all(servers: LocalServers) -> dict[str, str]:
    """One of each.

    Returns:
        option of the locustfile -> address.
    """
    any_port = "127.0.0.1:0"
    echo = servers.start("echo", "-m", "gtcpserver", "echo", "--bind", any_port)
    # Private networks are reached through the proxy only by rules that name them.
    proxy = ("-m", "gtcpserver", "proxy", "--mixed", any_port, "--allow-destination", echo)
    return {
        "echo_server": echo,
        "tls_server": servers.start("tls_echo", "examples/tls_echo.py", any_port),
        "line_server": servers.start("line_protocol", "examples/line_protocol.py", any_port),
        "http_server": servers.start("http_server", "examples/http_server.py", "--listen", any_port),
        "proxy_server": servers.start("proxy", *proxy),
    }
