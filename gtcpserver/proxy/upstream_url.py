"""The URLs of upstreams: "socks5://user:password@host:port", "https://host:port", "socks4a://unix:/path"."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from typing import Any, get_args
from urllib.parse import unquote_to_bytes

from gtcpserver.connection.proxy_header import ProxyVersion
from gtcpserver.errors import ConfigError

from .errors import BadTarget
from .target import Target, parse_authority
from .upstream import Place, Resolve, Scheme, UnixPath, Upstream

_SCHEMES: dict[str, Scheme] = {scheme: scheme for scheme in get_args(Scheme)}

#: What messages expect.
EXPECTED_URL = (
    "socks5://[user:password@]host:port or http://..., https://..., socks4://[user@]..., socks4a://...; "
    "unix:/path in place of host:port"
)

#: Bytes of sun_path in struct sockaddr_un, less the NUL at its end (unix(7)).
LONGEST_PATH = 107


def parse_upstream(
    name: str,
    url: str,
    through: Upstream | None = None,
    resolve: Resolve = "here",
    send_proxy: ProxyVersion | None = None,
    tls: Any = None,
    tls_name: str | None = None,
) -> Upstream:
    """Parse "socks5://user:password@host:port", "https://host:port", "socks4a://unix:/path" and so on; user and
    password may be percent-encoded.

    Args:
        tls: an ssl.SSLContext for "https"; None: one that trusts the system's CAs.
        tls_name: the name that the certificate of "https" must have; None: the host.

    Raises:
        ConfigError: it is malformed, or the arguments do not fit its scheme.

    Example::

        from gtcpserver.proxy.upstream_url import parse_upstream

        office = parse_upstream("office", "socks5://ada:p%40ss@proxy.example.com:1080")
        print(office.user, office.password)  # b'ada' b'p@ss'
    """
    expected = f"the url of upstream {name!r} must be {EXPECTED_URL}"
    # Not with urlsplit: it ends a password at its first "/", "?" or "#", and the rest would be in the message.
    # Everything before the last "@" is user and password.
    given, _, rest = url.partition("://")
    scheme = _SCHEMES.get(given.lower())
    if scheme is None:
        raise ConfigError(f"{expected}, got {_without_password(url)!r}")
    userinfo, where = _split(rest)
    try:
        target = _parse_place(where)
    except BadTarget as error:
        raise ConfigError(f"{expected}, got {_without_password(url)!r} ({error})") from None
    try:
        user, _, password = map(unquote_to_bytes, userinfo.partition(":"))
    except UnicodeEncodeError:  # from the command line, in another encoding
        raise ConfigError(f"{expected}: user and password must be UTF-8, or percent-encoded") from None
    _check_credentials(expected, scheme, user, password)
    if isinstance(target, UnixPath) and through is not None:
        raise ConfigError(f"a Unix socket is reached directly, got through = {through.name!r} for upstream {name!r}")
    if scheme == "socks4" and resolve == "there":
        raise ConfigError(f'SOCKS4 has no names: resolve = "there" needs socks4a, got socks4 for upstream {name!r}')
    if scheme != "https":
        if tls is not None or tls_name is not None:
            raise ConfigError(f"tls_ca and tls_name are for https, got {scheme} for upstream {name!r}")
    elif any(one.scheme == "https" for one in _chain(through)):
        raise ConfigError(f"one proxy of a chain may be https, got a second one, upstream {name!r}")
    elif isinstance(target, UnixPath) and tls_name is None:
        raise ConfigError(f"tls_name is needed for https by a Unix socket, upstream {name!r}")
    return Upstream(
        name=name,
        scheme=scheme,
        target=target,
        user=user,
        password=password,
        through=through,
        resolve=resolve,
        send_proxy=send_proxy,
        tls=(tls or make_tls_context()) if scheme == "https" else None,
        tls_name=(tls_name or (target.host if isinstance(target, Target) else "")) if scheme == "https" else "",
    )


def make_tls_context(ca: bytes | None = None) -> ssl.SSLContext:
    """Return a context for "https".

    Args:
        ca: certificates to trust, in PEM; None: the system's.

    Raises:
        ConfigError: there is no certificate in it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is None:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cadata=ca.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"tls_ca must be a PEM file with certificates of CAs ({error})") from None
    # As curl and Go: the certificate of a server, which signs nothing else, may be in the file itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _split(rest: str) -> tuple[str, str]:
    """Return user and password, and the place, of the part of a URL after its scheme."""
    if rest.startswith("unix:"):
        return "", rest
    userinfo, found, path = rest.rpartition("@unix:")
    if found:
        return userinfo, "unix:" + path
    userinfo, _, where = rest.rpartition("@")
    return userinfo, where


def _parse_place(where: str) -> Place:
    """Raise BadTarget."""
    if not where.startswith("unix:"):
        return parse_authority(where.removesuffix("/"))
    path = where.removeprefix("unix:")
    if path[:1] not in ("/", "@") or len(path) == 1 or "\0" in path:
        raise BadTarget(f"expected unix:/path or unix:@name, got {where!r}")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise BadTarget(f"the path of a Unix socket has {LONGEST_PATH} bytes at most")
    return UnixPath(path)


def _chain(upstream: Upstream | None) -> Iterator[Upstream]:
    while upstream is not None:
        yield upstream
        upstream = upstream.through


def _check_credentials(expected: str, scheme: Scheme, user: bytes, password: bytes) -> None:
    if scheme in ("socks4", "socks4a"):
        if password:
            raise ConfigError(f"{expected}: SOCKS4 has no passwords")
        if len(user) > 255 or b"\0" in user:
            raise ConfigError(f"{expected}: SOCKS4 has users of 255 bytes at most, without NUL")
        return
    if bool(user) != bool(password):
        raise ConfigError(f"{expected}: a user and a password, or none of them")
    if scheme in ("http", "https") and b":" in user:
        # The other proxy would take what follows for the password (RFC 7617 section 2).
        raise ConfigError(f"{expected}: HTTP has no users with a colon")
    if scheme == "socks5" and not max(len(user), len(password)) <= 255:
        raise ConfigError(f"{expected}: SOCKS5 has users and passwords of 255 bytes at most")


def _without_password(url: str) -> str:
    before, at, where = url.rpartition("@")
    if not at:
        return url
    scheme = before.partition("://")[0]
    return f"{scheme}://...@{where}" if scheme.isalnum() else f"...@{where}"
