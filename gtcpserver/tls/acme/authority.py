"""The authority: signed requests, the account, and what its errors mean (RFC 8555). Runs in the helper process."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, cast

from acme import jws, messages
from acme.client import ClientNetwork
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.json_util import encode_b64jose
from josepy.jwa import ES256
from josepy.jwk import JWKEC

from gtcpserver._version import __version__

from .folder import Folder, read_json, write_json
from .settings import ACMESettings

SECONDS = 30  # for an answer of the authority

#: How often a request is sent again because its nonce is too old (RFC 8555 section 6.5). Each brings the next nonce.
NONCES = 5

#: Characters of an authority's message in a log line.
LONGEST_DETAIL = 500

#: The error after which the account must be made again: the authority has forgotten it, as test authorities do.
FORGOTTEN = "accountDoesNotExist"

#: Errors that say nothing about what was asked for.
TRANSIENT = frozenset({"", "rateLimited", "serverInternal", "badNonce"})

ERROR_PREFIX = "urn:ietf:params:acme:error:"  # RFC 8555 section 6.7


class AuthorityError(Exception):
    """The authority refused a request, failed, or cannot be reached. The text is for the log.

    Attributes:
        kind: name of the error, as in RFC 8555 section 6.7 ("rateLimited"), or one of ours; "": it gave no answer.
        retry_after: seconds that the authority has asked for; None: it has not.
    """

    def __init__(self, text: str, kind: str = "", retry_after: float | None = None) -> None:
        super().__init__(text)
        self.kind = kind
        self.retry_after = retry_after


class Authority:
    """A connection with an account at the authority.

    Attributes:
        directory: the authority's URLs by name (RFC 8555 section 7.1.1).
        skew: seconds by which this host's clock is behind the authority's.
        retry_after: what the last answer asked for, in seconds; None for nothing.
    """

    def __init__(self, settings: ACMESettings, folder: Folder) -> None:
        self._settings = settings
        self._folder = folder
        self._key = _Key.kept(folder)
        self.directory: Mapping[str, Any] = {}
        self.skew = 0.0
        self.retry_after: float | None = None
        self._status = 0
        self._network = self._connect(self._key)

    def _connect(self, key: _Key) -> ClientNetwork:
        verify = self._settings.ca_file if self._settings.ca_file is not None else True
        network = ClientNetwork(
            key.jwk,
            alg=ES256,
            verify_ssl=cast(bool, verify),  # requests takes a path, too
            user_agent=f"gtcpserver/{__version__}",
            timeout=SECONDS,
        )
        network.session.hooks["response"].append(self._note)
        return network

    def _note(self, response: Any, *_arguments: Any, **_named: Any) -> None:
        self._status = response.status_code
        self.retry_after = seconds_in(response.headers.get("Retry-After"), time.time() + self.skew)
        try:
            date = parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
        except (ValueError, TypeError, OverflowError):
            return
        # A second is the unit of that field.
        self.skew = date - time.time() if abs(date - time.time()) > 2 else 0.0

    def now(self) -> float:
        """Return the authority's time, in seconds since the epoch: certificates are valid by its clock."""
        return time.time() + self.skew

    # -- requests ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Fetch the directory. Raise AuthorityError."""
        found = self.get(self._settings.directory)
        missing = [name for name in ("newNonce", "newAccount", "newOrder") if not isinstance(found.get(name), str)]
        if missing:
            raise AuthorityError(f"{self._settings.directory} is no ACME directory: it has no {missing[0]}")
        self.directory = found

    def get(self, url: str) -> dict[str, Any]:
        """Fetch a JSON object without a signature. Raise AuthorityError."""
        return json_of(self._tell(lambda: self._network.get(url)))

    def post(self, url: str, data: Mapping[str, Any] | None) -> Any:
        """Send a signed request and return the response; None as data: fetch (RFC 8555 section 6.3).

        Raises:
            AuthorityError: it failed.
        """
        return self._post(self._network, url, None if data is None else json.dumps(data))

    def _post(self, network: ClientNetwork, url: str, text: str | None) -> Any:
        payload = cast(Any, None if text is None else _Payload(text))
        for attempt in range(1, NONCES + 1):
            try:
                return self._tell(lambda: network.post(url, payload, new_nonce_url=self.directory["newNonce"]))
            except AuthorityError as error:
                if error.kind != "badNonce" or attempt == NONCES:
                    raise
        raise AssertionError

    def fetch(self, url: str) -> dict[str, Any]:
        """Fetch a JSON object of the account. Raise AuthorityError."""
        return json_of(self.post(url, None))

    def _tell(self, request: Any) -> Any:
        """Make a request, and turn all its errors into AuthorityError."""
        self._status, self.retry_after = 0, None
        try:
            return request()
        except messages.Error as error:
            name = error.typ or ""
            name = name.removeprefix(ERROR_PREFIX) if name.startswith(ERROR_PREFIX) else ""
            detail = readable(error.detail or error.title or "")
            text = ": ".join(part for part in (name or f"HTTP status {self._status}", detail) if part)
            raise AuthorityError(text, self._kind(name), self.retry_after) from None
        except Exception as error:
            # The libraries raise what they happen to meet in an answer: KeyError, AttributeError, RecursionError ...
            text = f"HTTP status {self._status}" if self._status >= 400 else readable(str(error) or repr(error))
            raise AuthorityError(text, self._kind(""), self.retry_after) from None

    def _kind(self, name: str) -> str:
        if self._status >= 500 or self._status in (408, 429):  # they pass: RFC 9110 sections 15.5.9 and 15.6
            return name if name in TRANSIENT else ""
        return name or (f"HTTP status {self._status}" if self._status >= 400 else "")

    # -- the account -------------------------------------------------------------------------------------------------

    @property
    def thumbprint(self) -> str:
        """Thumbprint of the account's key, for key authorizations (RFC 8555 section 8.1)."""
        return encode_b64jose(self._key.jwk.thumbprint())

    def log_in(self) -> bool:
        """Use the account that is kept, or make one with the key that is kept.

        Returns:
            whether it is new.

        Raises:
            AuthorityError: the authority refuses.
            OSError: the account cannot be kept.
        """
        kept = read_json(self._folder.account)
        self._finish_roll_over(kept)
        uri, email = self._key.uri, kept.get("email")
        if uri is None:
            self._register()
            return True
        self._use(uri)
        if email != self._settings.email:
            try:
                self.post(uri, {"contact": self._contact()})
            except AuthorityError as error:
                if error.kind != FORGOTTEN:
                    raise
                self._register()
                return True
            self._keep(uri)
        return False

    def forget_account(self) -> None:
        """Make the account again, with the same key. Raise as `log_in`."""
        self._register()

    def _register(self) -> None:
        # The key first: after a crash the same request finds the account that was made (RFC 8555 section 7.3.1).
        self._keep(None)
        self._network.account = None
        wanted = {"termsOfServiceAgreed": True, "contact": self._contact()}
        response = self._post(self._network, self.directory["newAccount"], json.dumps(wanted))
        uri = response.headers.get("Location")
        if not uri:
            raise AuthorityError("the answer to newAccount has no Location")
        self._use(uri)
        self._keep(uri)

    def _contact(self) -> list[str]:
        return [] if self._settings.email is None else [f"mailto:{self._settings.email}"]

    def _use(self, uri: str) -> None:
        self._network.account = cast(Any, {"uri": uri})

    def _keep(self, uri: str | None) -> None:
        self._key.uri = uri
        write_json(self._folder.account, {"uri": uri, "email": self._settings.email, "key": self._key.pem})

    # -- another key for the account ---------------------------------------------------------------------------------

    def roll_over(self) -> None:
        """Replace the account's key (RFC 8555 section 7.3.5). Call it after `log_in`.

        Raises:
            AuthorityError: the authority refuses; the old key stays.
            OSError: the new one cannot be kept.
        """
        url = self.directory.get("keyChange")
        if not isinstance(url, str):
            raise AuthorityError("the authority cannot change the keys of accounts")
        uri, new = self._key.uri, _Key()
        assert uri is not None
        # First of all: a crash must not lose the key that the authority knows.
        kept = read_json(self._folder.account)
        write_json(self._folder.account, {**kept, "next_key": new.pem})
        inner = json.dumps({"account": uri, "oldKey": self._key.jwk.public_key().to_partial_json() | {"kty": "EC"}})
        signed = jws.JWS.sign(inner.encode(), key=new.jwk, alg=ES256, nonce=None, url=url)
        self._post(self._network, url, signed.json_dumps())
        self._take(new, uri)

    def _take(self, key: _Key, uri: str) -> None:
        self._key = key
        self._network = self._connect(key)
        self._use(uri)
        self._keep(uri)

    def _finish_roll_over(self, kept: Mapping[str, Any]) -> None:
        """Find out which of two keys the authority has, after a change of keys that was cut short."""
        pem, uri = kept.get("next_key"), self._key.uri
        if not isinstance(pem, str) or uri is None:
            return
        key = _Key(pem, uri)
        try:
            # RFC 8555 section 7.3.1: ask with the key alone.
            self._post(self._connect(key), self.directory["newAccount"], json.dumps({"onlyReturnExisting": True}))
        except AuthorityError as error:
            if error.kind != FORGOTTEN:
                raise
            self._keep(uri)  # without the other
        else:
            self._take(key, uri)


class _Key:
    """The account's key, and the URL of the account; None: not known yet."""

    def __init__(self, pem: str | None = None, uri: str | None = None) -> None:
        if pem is None:
            key = ec.generate_private_key(ec.SECP256R1())
        else:
            loaded = serialization.load_pem_private_key(pem.encode(), None)
            if not isinstance(loaded, ec.EllipticCurvePrivateKey):
                raise ValueError("it is not of an elliptic curve")
            key = loaded
        self.pem = to_pem(key)
        self.jwk = JWKEC(key=key)
        self.uri = uri

    @classmethod
    def kept(cls, folder: Folder) -> _Key:
        """Return the key that is kept, or a new one. Raise AuthorityError."""
        data = read_json(folder.account)
        pem, uri = data.get("key"), data.get("uri")
        if not isinstance(pem, str):
            return cls()
        try:
            return cls(pem, uri if isinstance(uri, str) else None)
        except ValueError as error:
            raise AuthorityError(f'the key in "{folder.account}" cannot be used: {error}') from None


class _Payload:
    """What ClientNetwork.post signs."""

    def __init__(self, text: str) -> None:
        self._text = text

    def json_dumps(self, **_options: Any) -> str:
        return self._text


def to_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a private key in PEM form."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def json_of(response: Any) -> dict[str, Any]:
    """Return the object in a response. Raise AuthorityError."""
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise AuthorityError("the answer is no JSON object")
    return found


def readable(text: str) -> str:
    """Return a stranger's text in a form for one log line."""
    shown = "".join(one if one.isprintable() else " " for one in text)
    return shown if len(shown) <= LONGEST_DETAIL else shown[:LONGEST_DETAIL] + "..."


def seconds_in(value: str | None, now: float) -> float | None:
    """Return the seconds in a Retry-After field (RFC 9110 section 10.2.3); None without one, or for nonsense.

    Args:
        now: time of its sender, in seconds since the epoch.
    """
    if value is None:
        return None
    try:
        return max(float(int(value)), 0.0)
    except (ValueError, OverflowError):
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError):
        return None
