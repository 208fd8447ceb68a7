"""Authenticators: check passwords, and stop clients from guessing them.

Whatever knows the answer (hashes, a command) is slow, so it is asked as rarely as possible: once for all connections
that ask the same at the same time (a browser opens a hundred), not again for a minute after a success, and not at all
for an address with too many failures. A separate greenlet asks, so that a client that leaves, or runs out of time, does
not cancel the answer for others.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import shutil
import signal
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote_from_bytes

import gevent
import gevent.socket
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from gevent.threadpool import ThreadPool

from gtcpserver.diagnostics.logs import FaultLimiter, also
from gtcpserver.errors import ConfigError
from gtcpserver.files.lent import stat_file
from gtcpserver.plural import counted
from gtcpserver.process.children import is_reaped
from gtcpserver.process.forked import close_in_children
from gtcpserver.shared.column import Column
from gtcpserver.store.store import Store

from .passwords import MOST_REMEMBERED, REMEMBER, THREADS, Failures, check_hash, matches, read_htpasswd
from .target import IPAddress

log = logging.getLogger("gtcpserver")

#: Seconds between two checks of an htpasswd file.
LOOK_EVERY = 1.0

#: A file younger than this, in seconds, is read again at the next check: it may have been written again within the
#: granularity of its time stamp (4 ms on ext4, 2 s on FAT), which nothing else reveals.
YOUNG = 2.0


#: Seconds after which a connection that waits for an answer checks whether the asking greenlet is still alive.
LONGEST_WITHOUT_A_LOOK = 1.0


class _Question:
    """A user and a password being checked, and the connections that wait for the answer.

    Attributes:
        clients: the addresses that ask; they are told apart only to delay each of them.
        waiting: number of waiting connections.
        right: the answer; None: unknown.
        delays: extra seconds that each address has to wait because the password was wrong.
        asker: the greenlet that finds the answer.
    """

    asker: Any

    def __init__(self) -> None:
        self.clients: set[IPAddress] = set()
        self.waiting = 0
        self.right: bool | None = None
        self.delays: dict[IPAddress, float] = {}
        self.answered = Event()


class RememberingAuthenticator:
    """What all authenticators have in common; a subclass defines `verify`.

    Args:
        at_once: how many calls of `verify` run at the same time; the others wait.
        remember: seconds for which a correct password is accepted without asking again; 0: never.
    """

    def __init__(self, *, at_once: int, remember: float = REMEMBER) -> None:
        self._slots = BoundedSemaphore(at_once)
        self._remember = remember
        # Only digests of passwords are kept, which mean nothing outside this process.
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, float] = OrderedDict()
        self._questions: dict[bytes, _Question] = {}
        self._failures = Failures()
        self._faults = FaultLimiter()

    def share(self, column: Column, name: str) -> None:
        """Count failures together with all processes that have a column.

        Args:
            column: the column of this process.
            name: name of this authenticator.
        """
        self._failures.share(column, name)

    def share_store(self, store: Store, name: str) -> None:
        """Count failures together with other machines, too."""
        self._failures.share_store(store, name)

    def verify(self, user: bytes, password: bytes) -> bool | None:
        """Return whether this is the user's password; None: unknown, through no fault of the client.

        May wait. Must take as long for unknown users as for known ones.
        """
        raise NotImplementedError

    def check(self, user: bytes, password: bytes, client: IPAddress) -> bool:
        """Return whether the user name and password are correct. A wrong password is answered late."""
        if not self._failures.may_try(client):
            return False
        # Includes the length of one of them: "ab" and "c" must differ from "a" and "bc".
        digest = hmac.digest(self._key, len(user).to_bytes(4, "big") + user + password, hashlib.sha256)
        if self._right.get(digest, 0.0) > time.monotonic():
            return True
        question = self._questions.get(digest)
        if question is None or question.asker.dead:  # dead but still listed: memory ran out when it started
            question = _Question()
            question.asker = gevent.spawn(self._ask, digest, question, user, password)
            self._questions[digest] = question
        question.clients.add(client)
        question.waiting += 1
        try:
            while not question.answered.wait(LONGEST_WITHOUT_A_LOOK) and not question.asker.dead:
                pass
        finally:
            question.waiting -= 1
        if question.right:
            return True
        gevent.sleep(question.delays.get(client, 0.0))
        return False

    def _ask(self, digest: bytes, question: _Question, user: bytes, password: bytes) -> None:
        try:
            with self._slots:
                # While this question waited its turn, its clients may have gone, or failed too often with other
                # passwords: a thousand guesses sent at once count as no more than ten.
                if question.waiting and any(map(self._failures.may_try_anywhere, question.clients)):
                    question.right = self.verify(user, password)
                    self._note(digest, question, user)
        except Exception as error:
            self.complain(type(error).__name__, f"cannot authenticate: {type(error).__name__}: {error}")
        finally:
            self._questions.pop(digest, None)
            question.answered.set()

    def _note(self, digest: bytes, question: _Question, user: bytes) -> None:
        if question.right:
            if self._remember > 0:
                self._right[digest] = time.monotonic() + self._remember
                self._right.move_to_end(digest)
                if len(self._right) > MOST_REMEMBERED:
                    self._right.popitem(last=False)
            for client in question.clients:
                self._failures.forget(client, user)
        elif question.right is False:
            # Once for each address, no matter how many of its connections have tried this password at the same time.
            question.delays = {client: self._failures.note(client, user) for client in question.clients}

    def forget(self) -> None:
        """Accept no password without asking again; do not remember pending answers either."""
        self._key = secrets.token_bytes(32)
        self._right.clear()

    def complain(self, kind: str, message: str) -> None:
        """Log what an operator must know, but not once for every client affected."""
        suppressed = self._faults.allow(kind)
        if suppressed is not None:
            log.error("%s%s", message, also(suppressed))


# -- certificates ------------------------------------------------------------------------------------------------------


class CertificateUsers:
    """Users with a certificate from a CA that the listener trusts (TLS client authentication).

    The user is the common name of the certificate's subject (RFC 5280 section 4.1.2.6).

    Args:
        users: users to admit; None: everybody with a valid certificate.

    Example::

        from gtcpserver import TLSConfig
        from gtcpserver.proxy.authenticate import CertificateUsers
        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.handler import ProxyHandler

        gate = Gate(authenticators={"certificates": CertificateUsers({"ada", "grace"})})
        tls = TLSConfig("cert.pem", "key.pem", client_auth="required", client_ca="ca.pem")
        handler = ProxyHandler(gate, "http", tls=tls)
    """

    def __init__(self, users: Collection[str] | None = None) -> None:
        self._users = None if users is None else frozenset(users)

    def identify(self, certificate: Mapping[str, Any]) -> str | None:
        """Return the user of a certificate, as decoded by ``ssl.SSLSocket.getpeercert``; None: no user."""
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        if len(names) != 1 or not names[0] or (self._users is not None and names[0] not in self._users):
            return None
        return str(names[0])

    def check(self, user: bytes, password: bytes, client: IPAddress) -> bool:
        """Accept no password: only certificates count here."""
        return False


# -- hashes ------------------------------------------------------------------------------------------------------------


class HashedUsers(RememberingAuthenticator):
    """Users with their hashed passwords, listed here or in an htpasswd file.

    The file is reloaded when it changes. If it cannot be read then, or has a mistake, only a line is logged.

    Args:
        hashes: hashed passwords by user name.
        htpasswd: path of a file that may have more users, and may override passwords in `hashes`.

    Raises:
        ConfigError: a hash or the file is unusable, or there are no users.

    Example::

        from gtcpserver.proxy.authenticate import HashedUsers
        from gtcpserver.proxy.gate import Gate

        users = HashedUsers(htpasswd="users.htpasswd")
        gate = Gate(authenticators={"staff": users})
    """

    def __init__(
        self, hashes: Mapping[bytes, str] | None = None, htpasswd: str | None = None, *, remember: float = REMEMBER
    ) -> None:
        super().__init__(at_once=THREADS, remember=remember)
        self._listed = dict(hashes or {})
        self._htpasswd = htpasswd
        for kept in self._listed.values():
            check_hash(kept)
        if not self._listed and htpasswd is None:
            raise ConfigError("an authenticator needs users, or an htpasswd file")
        self._name_key = secrets.token_bytes(32)
        self._threads: ThreadPool | None = None
        self._next_look = 0.0
        # The stamp first: a change while the file is being read is noticed at the next check.
        self._stamp = None if htpasswd is None else _stamp(htpasswd)
        self._hashes: dict[bytes, str] = {}
        self._everybody: tuple[str, ...] = ()
        self._set_users({} if htpasswd is None else read_htpasswd(htpasswd))

    def verify(self, user: bytes, password: bytes) -> bool | None:
        if self._threads is None:
            self._threads = ThreadPool(THREADS)
        kept = self._hashes.get(user) or self._somebody(user)
        if kept is None:
            return False
        right = self._threads.apply(_compare, (kept, password))
        if right is None:
            self.complain("hash", f"the hash of a password cannot be used: {kept[:7]}...")
        # The file may have been reloaded in the meantime.
        return right and self._hashes.get(user) == kept

    def knows(self, user: str) -> bool:
        """Return whether this user is listed."""
        return user.encode() in self._hashes

    def check(self, user: bytes, password: bytes, client: IPAddress) -> bool:
        if self._htpasswd is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY
            self._look(self._htpasswd)
        return super().check(user, password, client)

    def _look(self, path: str) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            users = read_htpasswd(path)
        except ValueError as error:  # ConfigError, or what is no text
            log.error("%s; the users stay as they were", error)
            return
        if self._set_users(users):
            log.info("%s was reloaded: %s", path, counted(len(users), "user"))

    def _set_users(self, users: Mapping[bytes, str]) -> bool:
        hashes = {**self._listed, **users}
        if hashes == self._hashes:
            return False
        self._hashes = hashes
        self._everybody = tuple(hashes.values())
        self.forget()
        return True

    def _somebody(self, user: bytes) -> str | None:
        """Return the hash to compare for an unknown user: always the same one for a given name.

        Hashes may take different times. With one hash for all unknown names, a name with another time would be known.
        """
        if not self._everybody:
            return None
        number = int.from_bytes(hmac.digest(self._name_key, user, hashlib.sha256)[:8], "big")
        return self._everybody[number % len(self._everybody)]

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.kill()
            self._threads = None


def _compare(kept: str, password: bytes) -> bool | None:
    try:
        return matches(kept, password)
    except ValueError:  # raised by bcrypt if only the first characters look like a hash
        return None


def _stamp(path: str) -> tuple[object, ...] | None:
    """Return a value that changes when the file changes; None if there is no file."""
    try:
        found = stat_file(path)
    except OSError:
        return None
    is_young = 0 <= time.time() - found.st_mtime < YOUNG
    return found.st_ino, found.st_size, found.st_mtime_ns, time.monotonic() if is_young else 0


# -- a command ---------------------------------------------------------------------------------------------------------

#: Squid's helpers read lines of up to 8 kB (HELPER_INPUT_BUFFER); no password is that long.
LONGEST_QUESTION = 8000
LONGEST_ANSWER = 8192

#: Seconds until a helper that died without an answer is restarted: none the first time, then more and more.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0


class HelperError(Exception):
    """A helper process does not answer; the message says why."""


#: Maximum processes of one command; more is a mistake. squid's documentation goes up to 50 (auth_param, "children").
MOST_PROCESSES = 1000


class CommandAuthenticator(RememberingAuthenticator):
    """Ask a command that knows the users, as squid does ("auth_param basic program").

    The command is started once (or a few times) and then asked repeatedly: it reads lines of user and password, both
    percent-encoded, with a space between them, and answers each with a line that begins with OK, ERR (wrong), or BH (it
    cannot tell). It ends when its standard input does. Its standard error is that of this process. Squid's own helpers
    (basic_ldap_auth, basic_pam_auth ...) are such commands; without concurrency.

    Args:
        command: the program and its arguments; no shell is involved.
        processes: how many are asked at the same time, 1 to 1000. Each is started when it is needed.
        timeout: seconds for one answer; a helper that takes longer is killed.
        remember: seconds for which a correct password is accepted without asking again; 0: never.

    Raises:
        ConfigError: there is no such program, or a number is out of range.

    Example::

        from gtcpserver.proxy.authenticate import CommandAuthenticator
        from gtcpserver.proxy.gate import Gate

        users = CommandAuthenticator(["python3", "ask_directory.py"], timeout=5)
        gate = Gate(authenticators={"staff": users})
    """

    def __init__(
        self, command: Sequence[str], *, processes: int = 4, timeout: float = 10.0, remember: float = REMEMBER
    ) -> None:
        if not command or shutil.which(command[0]) is None:
            raise ConfigError(f"the command must be a program that can be run, got {' '.join(command)!r}")
        if not 1 <= processes <= MOST_PROCESSES:
            raise ConfigError(f"processes must be 1 to {MOST_PROCESSES}, got {processes}")
        if not 0 < timeout < float("inf"):
            raise ConfigError(f"timeout must be more than 0 seconds, got {timeout}")
        super().__init__(at_once=processes, remember=remember)
        self._name = command[0]
        # The helper used last is asked first: no more of them are started than are needed.
        self._idle = [_Helper(command, timeout) for _ in range(processes)]
        self._helpers = tuple(self._idle)

    def verify(self, user: bytes, password: bytes) -> bool | None:
        # An empty password is a success for LDAP servers (RFC 4513 section 5.1.2: unauthenticated bind).
        if not user or not password:
            return False
        question = f"{quote_from_bytes(user, safe='')} {quote_from_bytes(password, safe='')}\n".encode()
        if len(question) > LONGEST_QUESTION:
            return False
        helper = self._idle.pop()  # never empty: no more of these calls run than there are helpers
        try:
            return _verdict(helper.ask(question))
        except HelperError as error:
            self.complain("helper", f"cannot authenticate: {self._name} {error}")
            return None
        finally:
            self._idle.append(helper)

    def close(self) -> None:
        """End the processes."""
        for helper in self._helpers:
            helper.end()


def _verdict(answer: bytes) -> bool:
    words = answer.split(None, 1)
    if words[:1] == [b"OK"]:
        return True
    if words[:1] == [b"ERR"]:
        return False
    if words[:1] == [b"BH"]:
        raise HelperError(f"cannot tell: {answer[:100]!r}")
    raise HelperError(f"must answer OK, ERR or BH, got {answer[:100]!r}")


class _Helper:
    """One process of the command, asked by one greenlet at a time.

    Any error ends the process: a late answer must never be taken for the next one's.
    """

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self._command = list(command)
        self._timeout = timeout
        self._process: int | None = None  # its ID
        self._socket: Any = None
        self._deaths = 0
        self._not_before = 0.0

    def ask(self, question: bytes) -> bytes:
        """Return the line that answers `question`. Raise HelperError."""
        if self._process is not None and self._has_gone_wrong():
            self.end()
        if self._process is None:
            self._start()
        try:
            answer = self._exchange(question)
        except BaseException as error:
            self.end()
            if isinstance(error, (OSError, HelperError)):
                self._note_death()
            if isinstance(error, TimeoutError):
                raise HelperError(f"has not answered within {self._timeout:g} s") from None
            if isinstance(error, OSError):
                raise HelperError(f"has ended without an answer ({error})") from None
            raise
        self._deaths = 0
        return answer

    def _has_gone_wrong(self) -> bool:
        """Return whether it has ended since the last answer, or written output without being asked."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def _start(self) -> None:
        wait = self._not_before - time.monotonic()
        if wait > 0:
            raise HelperError(f"has ended {counted(self._deaths, 'time')}, and is not started again for {wait:.0f} s")
        ours, theirs = gevent.socket.socketpair()
        os.set_blocking(theirs.fileno(), True)
        try:
            # In its own session: Ctrl-C is for the server, which may still have to ask. The helper ends when we do,
            # because its standard input ends then.
            self._process = os.posix_spawnp(
                self._command[0],
                self._command,
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), number) for number in (0, 1)],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # which Python ignores
            )
        except OSError as error:
            ours.close()
            self._note_death()
            raise HelperError(f"cannot be started: {error.strerror}") from None
        finally:
            theirs.close()
        close_in_children(ours)
        self._socket = ours

    def _exchange(self, question: bytes) -> bytes:
        give_up = time.monotonic() + self._timeout
        self._socket.settimeout(self._timeout)
        self._socket.sendall(question)
        answer = b""
        while b"\n" not in answer:
            left = give_up - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            more = self._socket.recv(LONGEST_ANSWER)
            if not more:
                raise ConnectionError("end of file")
            answer += more
            if len(answer) > LONGEST_ANSWER:
                raise HelperError(f"answers with more than {LONGEST_ANSWER} bytes")
        line, _, behind = answer.partition(b"\n")
        if behind:
            raise HelperError("answers one question with more than one line")
        return line

    def _note_death(self) -> None:
        self._deaths += 1
        if self._deaths > 1:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._deaths - 2, 10))
            self._not_before = time.monotonic() + pause

    def end(self) -> None:
        """End the process, and those it has started."""
        process, sock = self._process, self._socket
        self._process = self._socket = None
        # Its ID, and that of its process group, cannot be reused until it is reaped. Kill it first: at the end of its
        # input a shell would exit at once, and leave its children behind.
        if process is not None and not is_reaped(process):
            with suppress(PermissionError):  # a setuid program: it ends when its input does
                os.killpg(process, signal.SIGKILL)
                is_reaped(process, 0)  # a millisecond after this signal; otherwise it would stay as a zombie
        if sock is not None:
            sock.close()
