"""An order, from the request to the certificate (RFC 8555 section 7.4). Runs in the helper process."""

from __future__ import annotations

import hashlib
import os
import ssl
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.json_util import encode_b64jose

from .authority import TRANSIENT, Authority, AuthorityError, json_of, readable, to_pem
from .folder import Folder, read_json, remove_file, write_file, write_json
from .settings import ACMESettings

#: Extension of a challenge's certificate (RFC 8737 section 3).
ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")

#: Seconds that an order may take in all. Let's Encrypt needs 5 to 20.
ORDER_SECONDS = 300.0

#: Seconds after which an order is given up when the authority fails once more: its URL may be out of reach for ever, or
#: the authority never finish. `schedule.PAUSES` allows six attempts in that time.
LONGEST_ORDER = 6 * 3600.0

#: Seconds between two questions whether the authority has finished: from the first to the last, if it names none.
FIRST_POLL, LAST_POLL = 0.5, 5.0

#: Longest pause that it may ask for.
LONGEST_POLL = 30.0

CONFLICT = "HTTP status 409"  #: Kind of an error that acme's library does not read (RFC 9773 section 5).
UNUSABLE = "unusable"  #: Kind of the error that we make of a certificate that cannot replace the old one.


class Ordering:
    """Orders a certificate, or goes on with an order that another process has begun.

    Args:
        say: called with each line for the log.
        sleep: called with seconds.
    """

    def __init__(
        self,
        settings: ACMESettings,
        folder: Folder,
        authority: Authority,
        say: Callable[[str, str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._authority = authority
        self._say = say
        self._sleep = sleep
        self._until = time.monotonic() + ORDER_SECONDS

    def order(self, replaces: str | None) -> x509.Certificate:
        """Put a new certificate and its key in place of the old ones.

        Args:
            replaces: identifier of the certificate that it replaces (RFC 9773 section 5); None for none.

        Returns:
            the certificate.

        Raises:
            AuthorityError: there is no certificate; the old one stays.
            OSError: it cannot be written; the old one stays.
        """
        uri, key, order = self._resume() or self._begin(replaces)
        try:
            found, chain = self._finish(uri, key, order)
        except AuthorityError as error:
            # What has failed stays failed (RFC 8555 section 7.1.6).
            if error.kind not in TRANSIENT or not self._is_recent():
                remove_file(self._folder.order)
            raise
        finally:
            for name in self._settings.names:
                remove_file(self._folder.challenge(name))
        write_file(self._folder.certificate, to_pem(key).encode() + chain.encode())
        remove_file(self._folder.order)
        return found

    def _finish(self, uri: str, key: ec.EllipticCurvePrivateKey, order: dict[str, Any]) -> tuple[x509.Certificate, str]:
        if order.get("status") == "pending":
            self._authorize(order)
            order = self._poll(uri, "pending")
        if order.get("status") == "ready":
            self._authority.post(_text(order, "finalize"), {"csr": self._csr(key)})
            order = self._poll(uri, "ready", "processing")
        elif order.get("status") == "processing":
            order = self._poll(uri, "processing")
        if order.get("status") != "valid":
            raise AuthorityError(_trouble(order, "the order failed"), "invalid")
        chain = self._authority.post(_text(order, "certificate"), None).text
        return self._check(chain, key), chain

    # -- begin or go on ----------------------------------------------------------------------------------------------

    def _begin(self, replaces: str | None) -> tuple[str, ec.EllipticCurvePrivateKey, dict[str, Any]]:
        key = ec.generate_private_key(ec.SECP256R1())
        wanted: dict[str, Any] = {"identifiers": [{"type": "dns", "value": name} for name in self._settings.names]}
        url = self._authority.directory["newOrder"]
        try:
            response = self._authority.post(url, wanted if replaces is None else {**wanted, "replaces": replaces})
        except AuthorityError as error:
            # RFC 9773 section 5: another order has replaced that certificate (409), or it is not known.
            if replaces is None or error.kind not in ("alreadyReplaced", "malformed", CONFLICT):
                raise
            response = self._authority.post(url, wanted)
        uri = response.headers.get("Location")
        order = json_of(response)
        if not uri:
            raise AuthorityError("the answer to newOrder has no Location")
        write_json(self._folder.order, {"uri": uri, "names": list(self._settings.names), "key": to_pem(key)})
        return uri, key, order

    def _resume(self) -> tuple[str, ec.EllipticCurvePrivateKey, dict[str, Any]] | None:
        kept = read_json(self._folder.order)
        uri, pem = kept.get("uri"), kept.get("key")
        if not isinstance(uri, str) or not isinstance(pem, str) or kept.get("names") != list(self._settings.names):
            return None
        try:
            key = serialization.load_pem_private_key(pem.encode(), None)
            order = self._authority.fetch(uri)
        except AuthorityError as error:
            if error.kind in TRANSIENT and self._is_recent():
                raise
            order = {}  # the authority has forgotten it, or cannot be asked for too long
        except ValueError:
            return None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or order.get("status") in (None, "invalid"):
            remove_file(self._folder.order)
            return None
        self._say("info", f"going on with the order {uri}, which is {order['status']}")
        return uri, key, order

    def _is_recent(self) -> bool:
        """Return whether the order was begun, and its file written, within LONGEST_ORDER."""
        try:
            age = time.time() - os.stat(self._folder.order).st_mtime
        except OSError:
            return False
        return abs(age) < LONGEST_ORDER  # this host's clock may have been ahead then

    # -- prove that the names are ours -------------------------------------------------------------------------------

    def _authorize(self, order: Mapping[str, Any]) -> None:
        waiting = []
        for url in _texts(order, "authorizations"):
            found = self._authority.fetch(url)
            if found.get("status") == "pending":
                self._answer(found)
                waiting.append(url)
            elif found.get("status") != "valid":
                raise AuthorityError(_trouble_of_challenge(found), "unauthorized")
        for url in waiting:
            found = self._poll(url, "pending")
            if found.get("status") != "valid":
                raise AuthorityError(_trouble_of_challenge(found), "unauthorized")

    def _answer(self, authorization: Mapping[str, Any]) -> None:
        name = str(_part(authorization, "identifier").get("value", "")).lower()
        if name not in self._settings.names:
            raise AuthorityError(f"the authority asks for another name: {readable(name)}", "malformed")
        challenges = authorization.get("challenges")
        for challenge in challenges if isinstance(challenges, list) else []:
            if isinstance(challenge, dict) and challenge.get("type") == "tls-alpn-01":
                break
        else:
            raise AuthorityError(f"the authority does not offer tls-alpn-01 for {name}", "unauthorized")
        proof = f"{_text(challenge, 'token')}.{self._authority.thumbprint}"
        write_file(self._folder.challenge(name), challenge_certificate(name, proof))
        if challenge.get("status") == "pending":
            self._authority.post(_text(challenge, "url"), {})

    def _poll(self, url: str, *unfinished: str) -> dict[str, Any]:
        pause = FIRST_POLL
        while True:
            found = self._authority.fetch(url)
            if found.get("status") not in unfinished:
                return found
            if time.monotonic() > self._until:
                raise AuthorityError(f"the authority has not finished within {ORDER_SECONDS:.0f} s")
            asked = self._authority.retry_after
            self._sleep(pause if asked is None else min(max(asked, FIRST_POLL), LONGEST_POLL))
            pause = min(pause * 1.5, LAST_POLL)

    # -- the certificate ---------------------------------------------------------------------------------------------

    def _csr(self, key: ec.EllipticCurvePrivateKey) -> str:
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in self._settings.names])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(names, critical=False)
            .sign(key, hashes.SHA256())
        )
        return encode_b64jose(request.public_bytes(serialization.Encoding.DER))

    def _check(self, chain: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        """Return the certificate of a chain that can replace the old one. Raise AuthorityError."""
        try:
            certificate = x509.load_pem_x509_certificates(chain.encode())[0]
            names = names_in(certificate)
            is_ours = certificate.public_key() == key.public_key()
        except Exception as error:  # UnsupportedAlgorithm, DuplicateExtension, ... are no ValueError
            raise AuthorityError(f"the certificate cannot be read: {error!r}", UNUSABLE) from None
        if not is_ours:
            raise AuthorityError("the certificate is for another key", UNUSABLE)
        missing = [name for name in self._settings.names if name not in names]
        if missing:
            raise AuthorityError(f"the certificate is not for {missing[0]}", UNUSABLE)
        if certificate.not_valid_after_utc.timestamp() <= self._authority.now():
            raise AuthorityError(f"the certificate has expired on {certificate.not_valid_after_utc:%Y-%m-%d}", UNUSABLE)
        self._try_out(to_pem(key).encode() + chain.encode())
        return certificate

    def _try_out(self, content: bytes) -> None:
        """Load it as the server will. Raise AuthorityError."""
        trial = self._folder.certificate + ".trial"
        try:
            write_file(trial, content)
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(trial)
        except ssl.SSLError as error:
            raise AuthorityError(f"OpenSSL does not take the certificate: {error}", UNUSABLE) from None
        finally:
            remove_file(trial)


def challenge_certificate(name: str, proof: str) -> bytes:
    """Return a self-signed certificate that proves a name, and its key (RFC 8737 section 3).

    Args:
        proof: the key authorization (RFC 8555 section 8.1).
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ACME challenge")])
    digest = hashlib.sha256(proof.encode()).digest()
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        # An OCTET STRING of 32 bytes, in DER.
        .add_extension(x509.UnrecognizedExtension(ACME_IDENTIFIER, b"\x04\x20" + digest), critical=True)
        .sign(key, hashes.SHA256())
    )
    return to_pem(key).encode() + certificate.public_bytes(serialization.Encoding.PEM)


def names_in(certificate: x509.Certificate) -> list[str]:
    """Return the host names that a certificate is for, in lower case."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [name.lower() for name in found.value.get_values_for_type(x509.DNSName)]


def read_certificate(path: str) -> x509.Certificate | None:
    """Return the certificate in use; None if there is none that can be used."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
        return x509.load_pem_x509_certificates(content)[0]
    except Exception:  # UnsupportedAlgorithm, ... are no ValueError
        return None


def _trouble_of_challenge(authorization: Mapping[str, Any]) -> str:
    name = readable(str(_part(authorization, "identifier").get("value", "")))
    challenges = authorization.get("challenges")
    for challenge in challenges if isinstance(challenges, list) else []:
        if isinstance(challenge, dict) and challenge.get("error") is not None:
            return _trouble(challenge, f"{name} was not proved")
    return f"{name} was not proved: its authorization is {readable(str(authorization.get('status')))}"


def _trouble(thing: Mapping[str, Any], what: str) -> str:
    problem = _part(thing, "error")
    kind = str(problem.get("type", "")).rpartition(":")[2]
    return readable(": ".join(part for part in (what, kind, str(problem.get("detail", ""))) if part))


def _part(thing: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = thing.get(name)
    return found if isinstance(found, dict) else {}


def _text(thing: Mapping[str, Any], name: str) -> str:
    found = thing.get(name)
    if not isinstance(found, str) or not found:
        raise AuthorityError(f"the authority's answer has no {name}", "malformed")
    return found


def _texts(thing: Mapping[str, Any], name: str) -> list[str]:
    found = thing.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise AuthorityError(f"the authority's answer has no {name}", "malformed")
    return found
