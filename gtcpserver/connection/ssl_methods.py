"""The methods of ssl.SSLSocket that programs call on an accepted connection, for those written against gevent or ssl.

New programs use ``Connection.tls``, which has the same and more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .stream import Stream


class SSLMethods:
    """Mixin of Connection. On a plain connection the methods raise ValueError and the properties are None."""

    __slots__ = ()

    stream: Stream

    def _ssl_object(self) -> Any:
        layer = self.stream.tls
        if layer is None:
            raise ValueError(f"No SSL wrapper around {self}")  # the standard library's words
        return layer.object

    def getpeercert(self, binary_form: bool = False) -> Any:
        """Return the client's certificate: a dict ({} if it was not verified), or DER; None if the client sent none."""
        return self._ssl_object().getpeercert(binary_form)

    def cipher(self) -> tuple[str, str, int] | None:
        """Return (name, version, bits of the key)."""
        return self._ssl_object().cipher()  # type: ignore[no-any-return]

    def shared_ciphers(self) -> list[tuple[str, str, int]] | None:
        """Return the cipher suites that both the client and we support."""
        return self._ssl_object().shared_ciphers()  # type: ignore[no-any-return]

    def compression(self) -> str | None:
        """Return None: compression is off."""
        return self._ssl_object().compression()  # type: ignore[no-any-return]

    def version(self) -> str | None:
        """Return "TLSv1.3" or "TLSv1.2"."""
        return self._ssl_object().version()  # type: ignore[no-any-return]

    def selected_alpn_protocol(self) -> str | None:
        """Return the protocol agreed on."""
        return self._ssl_object().selected_alpn_protocol()  # type: ignore[no-any-return]

    def pending(self) -> int:
        """Return the number of bytes decrypted and not read.

        At least 1 while a record is held for which the socket will not become readable.
        """
        layer = self.stream.tls
        return layer.pending() if layer is not None else int(self._ssl_object().pending())

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        """Return the channel binding data, known only to both sides of this connection (RFC 5929)."""
        if cb_type != "tls-unique":
            raise ValueError(f"{cb_type} channel binding type not implemented")
        return self._ssl_object().get_channel_binding(cb_type)  # type: ignore[no-any-return]

    def verify_client_post_handshake(self) -> None:
        """Request a certificate from the client (TLS 1.3); its answer arrives with the next reads."""
        try:
            self._ssl_object().verify_client_post_handshake()
        except OSError as error:
            self.stream.note(error)  # a client that cannot be asked (RFC 8446 section 4.2.6)
            raise

    @property
    def server_side(self) -> bool | None:
        """True; None on a plain connection."""
        return None if self.stream.tls is None else True

    @property
    def server_hostname(self) -> None:
        """None, as on every server side. ``tls.server_name`` is the name that the client asked for."""
        return None

    @property
    def session_reused(self) -> bool | None:
        """Whether the client resumed an earlier session."""
        return None if self.stream.tls is None else self.stream.tls.object.session_reused


def refuse(connection: Any, method: str, error: type[Exception]) -> NoReturn:
    """Refuse a method that would bypass the encryption, with the same errors as ssl.SSLSocket."""
    raise error(f"{method} not allowed on an encrypted connection, {connection}")
