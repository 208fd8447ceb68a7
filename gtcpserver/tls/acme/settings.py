"""ACMESettings: which certificate to order, from whom, and where to keep it."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from gtcpserver.errors import ConfigError

from ..names import check_server_name

#: Let's Encrypt's authorities by their short names. The certificates of "staging" are worthless, and its limits high.
DIRECTORIES: Mapping[str, str] = {
    "staging": "https://acme-staging-v02.api.letsencrypt.org/directory",
    "production": "https://acme-v02.api.letsencrypt.org/directory",
}

MAX_NAMES = 100  # of one certificate, at Let's Encrypt (https://letsencrypt.org/docs/rate-limits)

# One address, without the header fields that a mailto URL may have (RFC 8555 section 7.3).
_EMAIL = re.compile(r"[^\s@,?&\x00-\x1f]+@[^\s@,?&\x00-\x1f]+")


@dataclass(frozen=True)
class ACMESettings:
    """What `TLSConfig.acme` was given, checked.

    Attributes:
        names: host names, in lower case. The first one names the certificate's folder.
        email: address for messages of the authority; None: none.
        directory: URL of the authority's directory (RFC 8555 section 7.1.1).
        folder: absolute path of the folder with accounts, keys and certificates.
        ca_file: PEM file with the CAs that the authority's own certificate comes from; None: the usual ones.
    """

    names: tuple[str, ...]
    email: str | None
    directory: str
    folder: str
    ca_file: str | None

    @classmethod
    def checked(cls, names: Any, email: Any, directory: Any, folder: Any, ca_file: Any) -> ACMESettings:
        """Check the arguments of `TLSConfig.acme`. Raise ConfigError."""
        missing = [name for name in ("acme", "josepy", "cryptography") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"acme needs the package {missing[0]}: pip install 'gtcpserver[acme]'")
        return cls(
            names=_names(names),
            email=_email(email),
            directory=_directory(directory),
            folder=_folder(folder),
            ca_file=_ca_file(ca_file),
        )

    @property
    def is_staging(self) -> bool:
        """Whether its certificates are only for tests."""
        return self.directory == DIRECTORIES["staging"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ACMESettings:
        return cls(**{**data, "names": tuple(data["names"])})


def _names(given: Any) -> tuple[str, ...]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or not given:
        raise ConfigError(f'names must be a list of host names, such as ["example.com"], got {given!r}')
    if len(given) > MAX_NAMES:
        raise ConfigError(f"names must be at most {MAX_NAMES}, got {len(given)}")
    names = [check_server_name(one, 'names must be host names such as "example.com"') for one in given]
    for name in names:
        if name.startswith("*"):
            raise ConfigError(f"names must be without a wildcard, which tls-alpn-01 cannot prove, got {name!r}")
        if "." not in name:
            raise ConfigError(f"names must be full host names such as 'example.com', got {name!r}")
        if names.count(name) > 1:
            raise ConfigError(f"names must be different, got {name!r} twice")
    return tuple(names)


def _email(given: Any) -> str | None:
    if given is not None and not (isinstance(given, str) and given.isascii() and _EMAIL.fullmatch(given)):
        raise ConfigError(f"email must be one address such as 'admin@example.com', or None, got {given!r}")
    return given


def _directory(given: Any) -> str:
    short = ", ".join(f'"{name}"' for name in DIRECTORIES)
    expected = f"directory must be {short} or the https URL of an ACME directory"
    if not isinstance(given, str):
        raise ConfigError(f"{expected}, got {given!r}")
    url = DIRECTORIES.get(given, given)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    # RFC 8555 section 6.1: HTTPS only.
    plain = parts.scheme == "https" and parts.hostname and "@" not in parts.netloc and port != 0
    if not plain or not url.isascii() or not url.isprintable() or " " in url or parts.fragment:
        raise ConfigError(f"{expected}, got {given!r}")
    return url


def default_folder() -> str:
    """Return the folder for accounts, keys and certificates: the state directory of systemd.exec(5), or that of the
    XDG Base Directory Specification."""
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if state:
        return os.path.join(state, "acme")
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "gtcpserver", "acme")


def _folder(given: Any) -> str:
    path = default_folder() if given is None else os.fspath(given) if isinstance(given, (str, os.PathLike)) else ""
    if not isinstance(path, str) or not path or "\0" in path:
        raise ConfigError(f"folder must be the path of a folder, or None, got {given!r}")
    path = place = os.path.abspath(path)
    while not os.path.lexists(place):  # it is made when it is needed
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f'folder "{path}" cannot be used: "{place}" is not a folder')
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError(f'folder "{path}" cannot be used: user {os.geteuid()} may not write to "{place}"')
    return path


def _ca_file(given: Any) -> str | None:
    if given is None:
        return None
    path = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(path, str) or not os.path.isfile(path):
        raise ConfigError(f"ca_file must be a PEM file, or None, got {given!r}")
    return os.path.abspath(path)
