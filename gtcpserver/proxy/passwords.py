"""Users and their passwords, kept as hashes.

A good hash takes some 30 ms, and a browser opens a hundred connections: hashes are computed in native threads, so that
the event loop goes on, and a password that was correct a moment ago is recognized by a keyed digest.
"""

from __future__ import annotations

import os
import re
from collections import Counter, OrderedDict
from hashlib import blake2b
from ipaddress import IPv6Address, IPv6Network
from time import monotonic
from typing import Any

from gtcpserver.errors import ConfigError
from gtcpserver.files.lent import read_file
from gtcpserver.shared.column import Column, now
from gtcpserver.store.store import Store

from .target import IPAddress

#: Recently correct passwords: how many, and for how many seconds they are accepted without computing the hash.
MOST_REMEMBERED = 10_000
REMEMBER = 60.0

#: Simultaneous hash computations. They only use CPU; more than there are CPUs would wait for each other.
THREADS = max(2, os.cpu_count() or 1)

#: Cost of failures to an address: each one delays its answer by this many seconds more, up to the second figure; after
#: this many within the window, no more are checked until the window is over.
FIRST_DELAY = 0.5
LONGEST_DELAY = 5.0
MOST_FAILURES = 10
WINDOW = 300.0

#: Addresses whose failures are remembered; beyond that, the one that failed longest ago is forgotten.
MOST_ADDRESSES = 10_000


_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")


def hash_password(password: bytes) -> str:
    """Return a hash for a configuration: argon2id with the library's parameters (RFC 9106).

    Raises:
        ConfigError: the package argon2-cffi is missing.
    """
    return str(_argon2().hash(password))


def check_hash(kept: str) -> None:
    """Raise ConfigError for an unusable hash."""
    if kept.startswith("$argon2"):
        _argon2()
        import argon2

        try:
            argon2.extract_parameters(kept)
        except argon2.exceptions.InvalidHashError:
            raise ConfigError("a password hash that begins with $argon2 is damaged") from None
    elif kept.startswith(("$2a$", "$2b$", "$2y$")):
        _bcrypt()
        if not _BCRYPT.fullmatch(kept):
            raise ConfigError(f"a password hash that begins with {kept[:4]} is damaged")
    else:
        raise ConfigError(
            "a password must be a hash that begins with $argon2 or $2y$ (gtcpserver proxy hash-password makes one), "
            f"got {kept[:4]!r}..."
        )


def matches(kept: str, password: bytes) -> bool:
    """Return whether a password matches a hash. Takes 30 ms."""
    if kept.startswith("$argon2"):
        argon2: Any = _argon2()
        try:
            return bool(argon2.verify(kept, password))
        except Exception:  # its errors for "wrong" and "not a hash" have no common base class
            return False
    # bcrypt uses 72 bytes and rejects more; htpasswd truncates, and so do we.
    return bool(_bcrypt().checkpw(password[:72], kept.encode()))


def _argon2() -> Any:
    try:
        import argon2
    except ImportError:
        raise ConfigError("passwords hashed by argon2 need the package argon2-cffi: pip install argon2-cffi") from None
    return argon2.PasswordHasher()


def _bcrypt() -> Any:
    try:
        import bcrypt
    except ImportError:
        raise ConfigError("passwords hashed by bcrypt need the package bcrypt: pip install bcrypt") from None
    return bcrypt


def read_htpasswd(path: str) -> dict[bytes, str]:
    """Read the users of an htpasswd file (`htpasswd -B`).

    Raises:
        ConfigError: the file, or a line of it, cannot be read.
    """
    users = {}
    try:
        content = read_file(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        name, colon, kept = line.partition(b":")
        if not colon or not name:
            raise ConfigError(f"{path} line {number} must be name:hash")
        try:
            users[name] = kept.decode("ascii")
            check_hash(users[name])
        except UnicodeDecodeError:
            raise ConfigError(f"{path} line {number}: a hash must be ASCII") from None
        except ConfigError as error:
            raise ConfigError(f"{path} line {number}: {error}") from None
    return users


class Failures:
    """Failures of each address; an IPv6 client is its /64, which belongs to it."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, tuple[Counter[bytes], float]] = OrderedDict()
        self._shared: SharedFailures | None = None
        self._everywhere: StoredFailures | None = None

    def share(self, column: Column, name: str) -> None:
        """Count together with all processes that have a column.

        Args:
            column: the column of this process.
            name: name of the authenticator.
        """
        self._shared = SharedFailures(column, name)

    def share_store(self, store: Store, name: str) -> None:
        """Count together with other machines, too."""
        self._everywhere = StoredFailures(store, name)

    def may_try_anywhere(self, client: IPAddress) -> bool:
        """Return False while an address has failed too often on all machines together. May wait."""
        return self.may_try(client) and (self._everywhere is None or self._everywhere.may_try(client))

    def may_try(self, client: IPAddress) -> bool:
        """Return False while an address has failed too often, as far as this machine knows."""
        if self._everywhere is not None and self._everywhere.is_banned(client):
            return False
        if self._shared is not None:
            return self._shared.count(client) < MOST_FAILURES
        wrong, last = self._known.get(_network(client), _NOTHING)
        return wrong.total() < MOST_FAILURES or monotonic() - last > WINDOW

    def note(self, client: IPAddress, user: bytes) -> float:
        """Note a failure; return the seconds that its answer has to wait. May wait for the store."""
        here = self._note_here(client, user)
        return here if self._everywhere is None else max(here, _delay(self._everywhere.note(client, user)))

    def _note_here(self, client: IPAddress, user: bytes) -> float:
        if self._shared is not None:
            return _delay(self._shared.note(client, user))
        network = _network(client)
        wrong, last = self._known.pop(network, _NOTHING)
        if wrong is _NOTHING[0] or monotonic() - last > WINDOW:
            wrong = Counter()
        wrong[user] += 1
        self._known[network] = (wrong, monotonic())
        if len(self._known) > MOST_ADDRESSES:
            self._known.popitem(last=False)
        return _delay(wrong.total())

    def forget(self, client: IPAddress, user: bytes) -> None:
        """Forget failures for this user after a success, but no others: an account must not help to guess another."""
        if self._everywhere is not None:
            self._everywhere.forget(client, user)
        if self._shared is not None:
            self._shared.forget(client, user)
            return
        network = _network(client)
        wrong, _ = self._known.get(network, _NOTHING)
        wrong.pop(user, None)
        if not wrong:
            self._known.pop(network, None)


class SharedFailures:
    """Failures that all processes with a column count together.

    An address has a series of them, and so has each user that it tried: a success takes the user's failures out of
    both, whichever processes have counted them.

    Args:
        column: the column of this process.
        name: name of the authenticator.
    """

    def __init__(self, column: Column, name: str) -> None:
        self._column = column
        self._name = b"failures " + name.encode() + b" "

    def count(self, client: IPAddress) -> int:
        """Return the failures of an address."""
        return self._column.series(self._column.find(self._key(client)), _WINDOW_NS, now())[0]

    def note(self, client: IPAddress, user: bytes) -> int:
        """Note a failure; return the failures of the address."""
        at, column = now(), self._column
        found = column.find(self._key(client))
        count, since = column.series(found, _WINDOW_NS, at)
        column.add_event(found, since or at, at)
        column.add_event(column.find(self._key(client, user)), since or at, at)
        return count + 1

    def forget(self, client: IPAddress, user: bytes) -> None:
        """Forget the failures of an address for one user."""
        column = self._column
        of_client, of_user = column.find(self._key(client)), column.find(self._key(client, user))
        count, since = column.series(of_client, _WINDOW_NS, now())
        wrong = column.events(of_user, since) if count else 0
        if wrong:
            column.take_back_events(of_user, wrong, since)
            column.take_back_events(of_client, min(wrong, count), since)

    def _key(self, client: IPAddress, user: bytes | None = None) -> bytes:
        address = client.packed[:8] if isinstance(client, IPv6Address) else client.packed
        return self._name + bytes([len(address)]) + address + (b"" if user is None else b" " + user)


class StoredFailures:
    """Failures that several machines count together. What one machine learns of a ban, it remembers.

    Args:
        store: where they are counted.
        name: name of the authenticator.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._banned: OrderedDict[Any, float] = OrderedDict()

    def is_banned(self, client: IPAddress) -> bool:
        """Return whether an address was known to be banned, and still is."""
        return self._banned.get(_network(client), 0.0) > monotonic()

    def may_try(self, client: IPAddress) -> bool:
        """Ask whether an address may try; True while the store is away. Waits."""
        self._learn(client, self._store.wrong(self._key(client)))
        return not self.is_banned(client)

    def note(self, client: IPAddress, user: bytes) -> int:
        """Note a failure; return the failures of the address, 0 while the store is away. Waits."""
        return self._learn(client, self._store.wrong(self._key(client), _digest(user), 1, WINDOW))

    def forget(self, client: IPAddress, user: bytes) -> None:
        """Forget the failures of an address for one user."""
        self._store.forget_wrong(self._key(client), _digest(user))

    def _learn(self, client: IPAddress, found: tuple[int, float] | None) -> int:
        if found is None:
            return 0
        if found[0] >= MOST_FAILURES:
            network = _network(client)
            self._banned[network] = monotonic() + min(found[1], WINDOW)
            self._banned.move_to_end(network)
            if len(self._banned) > MOST_ADDRESSES:
                self._banned.popitem(last=False)
        return found[0]

    def _key(self, client: IPAddress) -> str:
        return f"{self._name}:{_network(client)}"


def _digest(user: bytes) -> str:
    # A name that was tried may be a password in the wrong field.
    return blake2b(user, digest_size=8).hexdigest()


def _delay(failures: int) -> float:
    return float(min(LONGEST_DELAY, FIRST_DELAY * failures))


_WINDOW_NS = int(WINDOW * 1e9)

_NOTHING: tuple[Counter[bytes], float] = (Counter(), 0.0)


def _network(client: IPAddress) -> Any:
    return IPv6Network((client, 64), strict=False) if isinstance(client, IPv6Address) else client
