"""A TLS client that writes its records by hand: any content type, length, number and order, correctly encrypted."""

import hashlib
import hmac
import ssl
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23

WARNING_USER_CANCELED = b"\x01\x5a"  # RFC 8446 section 6.1
KEY_UPDATE = b"\x18\0\0\x01"  # section 4.6.3, before update_not_requested or update_requested
NEW_SESSION_TICKET = b"\x04\0\0\x0d" + bytes(8) + b"\0\0\x01x\0"[:5]
HELLO_REQUEST = b"\0\0\0\0"  # RFC 5246 section 7.4.1.1


def plain(content, data=b""):
    """A record that is not encrypted."""
    return struct.pack("!BHH", content, 0x0303, len(data)) + data


class Forger:
    """A connection whose handshake the ssl module has done, and which goes on by hand.

    Args:
        sock: connected and blocking; run everything here in a thread.
        folder: where the ssl module may write the secrets.
        version: ssl.TLSVersion.
    """

    def __init__(self, sock, folder, version):
        self.sock = sock
        log = folder / "secrets"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        context.set_ciphers("ECDHE+AESGCM:!AES256")  # of TLS 1.2: the arithmetic below is for AES-128
        context.keylog_filename = str(log)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self._first_flight = b""
        self._do(self.tls.do_handshake)
        self._secrets = {line.split()[0]: line.split()[1:] for line in log.read_text().splitlines() if line[0] != "#"}
        log.unlink()
        self._13 = version is ssl.TLSVersion.TLSv1_3
        if self._13:
            self._hash = {"TLS_AES_128_GCM_SHA256": "sha256"}.get(self.tls.cipher()[0], "sha384")
            self._use(bytes.fromhex(self._secrets["CLIENT_TRAFFIC_SECRET_0"][1]))
        else:
            self._use_master(*(bytes.fromhex(text) for text in self._secrets["CLIENT_RANDOM"]))

    def _do(self, call, *arguments):
        while True:
            try:
                result = call(*arguments)
            except ssl.SSLWantReadError:
                result = None
            written = self.outgoing.read()
            if written:
                self.sock.sendall(written)
            if result is not None or (call == self.tls.do_handshake and self.tls.version()):
                return result
            received = self.sock.recv(65536)
            assert received
            self._first_flight = self._first_flight or received
            self.incoming.write(received)

    def read(self, size):
        """What the server has sent, decrypted."""
        return self._do(self.tls.read, size)

    def _expand(self, secret, label, size):
        label = b"tls13 " + label
        info = struct.pack("!HB", size, len(label)) + label + b"\0\x01"
        return hmac.new(secret, info, self._hash).digest()[:size]

    def _use(self, secret):
        """RFC 8446 section 7.3."""
        self._secret, self._number = secret, 0
        size = 32 if self._hash == "sha384" else 16
        self._cipher, self._iv = AESGCM(self._expand(secret, b"key", size)), self._expand(secret, b"iv", 12)

    def _use_master(self, client_random, master):
        """RFC 5246 sections 5 and 6.3, RFC 5288."""
        seed = b"key expansion" + self._first_flight[11:43] + client_random
        block = last = b""
        last = seed
        while len(block) < 40:
            last = hmac.digest(master, last, "sha256")
            block += hmac.digest(master, last + seed, hashlib.sha256)
        self._cipher, self._iv, self._number = AESGCM(block[:16]), block[32:36], 1  # its Finished was number 0

    def record(self, content, data=b"", padding=0):
        """The next record."""
        number, self._number = self._number, self._number + 1
        if not self._13:
            explicit = number.to_bytes(8, "big")
            sealed = self._cipher.encrypt(
                self._iv + explicit, data, explicit + struct.pack("!BHH", content, 0x0303, len(data))
            )
            return plain(content, explicit + sealed)
        nonce = (int.from_bytes(self._iv, "big") ^ number).to_bytes(12, "big")
        header = struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(data) + 1 + padding + 16)
        return header + self._cipher.encrypt(nonce, data + bytes([content]) + bytes(padding), header)

    def key_update(self, requested=False, padding=0):
        """The next record; those after it have the next key."""
        record = self.record(HANDSHAKE, KEY_UPDATE + bytes([requested]), padding)
        self._use(self._expand(self._secret, b"traffic upd", len(self._secret)))
        return record
