"""Keys of session tickets that all workers have in common.

OpenSSL makes keys of its own for each SSL_CTX, so that a ticket is valid in the process that issued it. The ssl module
has no way to set them, and SSL_CTX_set_tlsext_ticket_keys(3) wants the SSL_CTX, which is the first field of Python's
object behind its header (Modules/_ssl.c, since Python 2.7). Nothing is written before the address is proved right: its
memory is read by a system call, which cannot crash, and must hold the address of the method that the context was made
with (the first or second word of an SSL_CTX, ssl/ssl_local.h of OpenSSL 1.1.1 to 3.x).

The keys are derived from a secret that the workers share, and from everything that a session must not get around: who
may connect with which certificate, and what the server calls itself. Servers that differ in that do not accept each
other's tickets, nor does one accept those from before a change.
"""

from __future__ import annotations

import _ssl
import hmac
import ssl
from functools import cache
from typing import Any, Protocol

from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.errors import GtcpServerError

log = own_logger("gtcpserver.tls")

#: Bytes of a set of keys: its name, which is in clear in each ticket, a key for HMAC and one for AES.
KEY_BYTES = 80
NAME_BYTES = 16

#: Of SSL_CTX_ctrl (openssl/ssl.h, openssl/tls1.h).
_GET_TICKET_KEYS = 58
_SET_TICKET_KEYS = 59

_METHODS = ("TLS_server_method", "TLS_method")


class Secrets(Protocol):
    """What the workers share (`SharedMemory`)."""

    def ticket_version(self) -> int:
        """Return a number that changes with the secrets."""

    def ticket_secrets(self) -> tuple[bytes, bytes | None]:
        """Return the secret for new tickets, and the one before it; None: there was none."""


class CannotSetKeys(GtcpServerError):
    """This Python or its OpenSSL does not let us; nothing was changed."""


_secrets: Secrets | None = None


def share(secrets: Secrets | None) -> None:
    """Use secrets for the contexts of this process from now on. None: each context keeps its own."""
    global _secrets
    _secrets = secrets


def shared_secrets() -> Secrets | None:
    return _secrets


def give_up(error: Exception) -> None:
    """Go on without shared secrets, and say why, once."""
    share(None)
    log.warning("a TLS session can only be resumed by the worker that it began with: %s", error)


def derive(secret: bytes, identity: bytes) -> bytes:
    """Return a set of keys (HKDF-Expand, RFC 5869 section 2.3).

    Args:
        secret: a secret of 32 random bytes.
        identity: digest of what a session must not get around.
    """
    block, keys = b"", b""
    for number in (1, 2):
        block = hmac.digest(secret, block + b"gtcpserver ticket keys " + identity + bytes([number]), "sha512")
        keys += block
    return keys[:KEY_BYTES]


def set_ticket_keys(context: ssl.SSLContext, keys: bytes) -> None:
    """Set the keys of a context's tickets. 20 us.

    Raises:
        CannotSetKeys: that is not possible.
    """
    library = _library()
    address = _address_of(library, context)
    ctypes = library.ctypes
    if library.control(address, _SET_TICKET_KEYS, KEY_BYTES, ctypes.create_string_buffer(keys, KEY_BYTES)) != 1:
        raise CannotSetKeys("OpenSSL does not take the keys of tickets")
    found = ctypes.create_string_buffer(KEY_BYTES)
    library.control(address, _GET_TICKET_KEYS, KEY_BYTES, found)
    if found.raw != keys:
        raise CannotSetKeys("OpenSSL has other keys of tickets than those it was given")


class _Library:
    """OpenSSL and the C library, as far as they are called."""

    def __init__(self) -> None:
        import ctypes

        self.ctypes: Any = ctypes
        # Its symbols and those of the libraries that it was linked with: the same OpenSSL that Python uses.
        openssl = ctypes.CDLL(getattr(_ssl, "__file__", None))
        self.control = openssl.SSL_CTX_ctrl
        self.control.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p)
        self.control.restype = ctypes.c_long
        self.methods = []
        for name in _METHODS:
            method = getattr(openssl, name)
            method.restype = ctypes.c_void_p
            self.methods.append(method())
        self.read_memory = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self.read_memory.restype = ctypes.c_ssize_t


@cache
def _library() -> _Library:
    try:
        return _Library()
    except (ImportError, AttributeError, OSError) as error:
        raise CannotSetKeys(f"no access to OpenSSL: {error}") from None


def _address_of(library: _Library, context: Any) -> int:
    """Return the address of a context's SSL_CTX."""
    # SSLContext is a subclass: its fields come behind those of the C class.
    if not isinstance(context, _ssl._SSLContext):  # noqa: SLF001 - Python's name for it
        raise CannotSetKeys(f"{type(context).__name__} is no context of Python's")
    address = _read(library, id(context) + object.__basicsize__, 1)[0]
    if not address or not any(word and word in library.methods for word in _read(library, address, 2)):
        raise CannotSetKeys("the layout of Python's SSLContext, or of OpenSSL's SSL_CTX, is unknown")
    return address


def _read(library: _Library, address: int, count: int) -> list[int]:
    """Read words of this process's memory by process_vm_readv(2), which fails where there is none."""
    import os

    ctypes = library.ctypes
    words = (ctypes.c_size_t * count)()
    size = ctypes.sizeof(words)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(words), size)  # struct iovec
    there = (ctypes.c_size_t * 2)(address, size)
    got = library.read_memory(os.getpid(), here, ctypes.c_ulong(1), there, ctypes.c_ulong(1), ctypes.c_ulong(0))
    if got != size:
        raise CannotSetKeys("the layout of Python's SSLContext is unknown, or memory cannot be read")
    return list(words)
