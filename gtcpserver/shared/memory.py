"""SharedMemory: the memory of a service's counts. The master makes it before it forks, and hands it to the next master.

It is a table with a column for each process that counts. A process writes only into its own column, and reads all of
them, so that no lock is needed. A column belongs to the process that holds its lock (fcntl(2): a record lock on one
byte of the file), which the kernel releases when the process ends, however it ends. So workers of two generations, or
of two masters, never share a column, and no process has to say who has which.

What a process had open ends with it: the master gives the column of a dead process a new epoch, and numbers of older
epochs count as 0. What a client did before (its rate, its failures) stays until somebody needs the place.

Layout, in words of 8 bytes in the machine's byte order; each store of a word is atomic:

    header      MAGIC, number of columns, number of sets, number of columns that were ever claimed
    key         32 random bytes: nobody outside can tell which clients share a set
    tickets     version, time of the change, and TICKET_SECRETS secrets for keys of TLS tickets: the one of the version
                (modulo their number), those before it, and one that nobody uses, which is the next to be written
    live        a byte for each column: 1 while a process has it, and after its death until that is noticed
    epochs      a word for each column
    numbers     for each of NUMBERS a word for each column
    tags        [set][column][way]: 64 bits of the digest of an entry's key; 0: empty
    entries     [set][column][way]: the words of an entry (`column`)

A worker that was taken over by an attacker can write anything in here. That may refuse clients or admit them, but all
is read as whole numbers in a place of fixed size, which nobody can change (F_SEAL_SHRINK, F_SEAL_GROW).
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from time import monotonic_ns

from gtcpserver.errors import GtcpServerError
from gtcpserver.linux import memory_file
from gtcpserver.process.descriptors import close_descriptor

log = logging.getLogger("gtcpserver")

#: "gtcpsrv" and the version of the layout. A new master of another version begins with a new memory.
MAGIC = int.from_bytes(b"gtcpsrv\x02", "little")

#: Places that one column has in a set, for the entries whose digests lead there.
WAYS = 4

#: Words of an entry.
WORDS = 4

#: Numbers that each column has once.
NUMBERS = ("connections", "proxy_connections", "proxy_attempts", "accepted")
#: Those of them that count what is open, and so end with their process.
GAUGES = ("connections", "proxy_connections", "proxy_attempts")

#: Columns for each worker: with one generation that serves, one that starts and one that finishes, one is left.
COLUMNS_PER_WORKER = 4
LEAST_COLUMNS = 16
MOST_COLUMNS = 8192

#: Clients that the memory holds at least. Each takes 40 bytes in each column, as soon as one of them needs it.
MOST_CLIENTS = 65536
LEAST_CLIENTS = 4096

#: Entries of all columns, unless that leaves less than LEAST_CLIENTS: 40 MiB.
ENTRIES = 2**20

KEY_BYTES = 32

TICKET_SECRETS = 3
_HEADER_WORDS = 4

#: Index of the word with the number of columns that were ever claimed. They are claimed from the first on, and the
#: others are empty: nobody has to read them.
CLAIMED = 3


class SharedMemory:
    """The memory; `make` and `adopt` are its constructors.

    Attributes:
        columns, sets: its size.
        fd: the descriptor, for the next master; -1 once it is closed.
        data: the mapped memory.
        words: the same as signed words.
    """

    def __init__(self, fd: int, columns: int, sets: int) -> None:
        self.fd = fd
        self.columns = columns
        self.sets = sets
        self.key_at = 8 * _HEADER_WORDS
        self.tickets_at = self.key_at + KEY_BYTES
        self.live_at = self.tickets_at + 16 + TICKET_SECRETS * KEY_BYTES
        self.epochs_at = (self.live_at + columns) // 8  # in words, as those that follow
        self.numbers_at = self.epochs_at + columns
        self.tags_at = self.numbers_at + len(NUMBERS) * columns
        self.entries_at = self.tags_at + sets * columns * WAYS
        self.data = mmap.mmap(fd, size_of(columns, sets))
        self.words = memoryview(self.data).cast("q")

    @classmethod
    def make(cls, workers: int) -> SharedMemory:
        """Make an empty memory. It takes no memory before it is used.

        Args:
            workers: number of workers to expect.

        Raises:
            OSError: descriptors or memory ran out.
        """
        columns = columns_for(workers)
        sets = clients_of(columns) // WAYS
        fd = memory_file("gtcpserver", size_of(columns, sets), sealed=True)
        try:
            made = cls(fd, columns, sets)
        except BaseException:
            close_descriptor(fd)
            raise
        made.words[1], made.words[2] = columns, sets
        made.data[made.key_at : made.tickets_at] = os.urandom(KEY_BYTES)
        made.data[made.tickets_at + 16 : made.tickets_at + 16 + KEY_BYTES] = os.urandom(KEY_BYTES)
        made.words[made.tickets_at // 8 + 1] = monotonic_ns()
        made.words[0] = MAGIC
        return made

    @classmethod
    def adopt(cls, fd: int) -> SharedMemory:
        """Take over the memory of the last master.

        Raises:
            GtcpServerError: it is of another version, or damaged.
            OSError, ValueError: it cannot be mapped. In all cases the descriptor stays open.
        """
        os.set_inheritable(fd, False)
        size = os.fstat(fd).st_size
        with mmap.mmap(fd, mmap.PAGESIZE) as page:
            magic, columns, sets = memoryview(page[: 8 * CLAIMED]).cast("q")
        valid = _is_power_of_two(columns, LEAST_COLUMNS, MOST_COLUMNS) and _is_power_of_two(sets, 1, MOST_CLIENTS)
        if magic != MAGIC or not valid or size != size_of(columns, sets):
            raise GtcpServerError("the counts of the running master have another layout")
        return cls(fd, columns, sets)

    @property
    def clients(self) -> int:
        """Number of clients that it holds."""
        return self.sets * WAYS

    # -- columns -----------------------------------------------------------------------------------------------------

    def claim(self) -> int | None:
        """Return a column that is this process's until it ends; None: all are taken. Call once in a process."""
        for column in range(self.columns):
            if self._lock(column):
                self._note_claimed(column)
                self.begin_epoch(column)
                self.data[self.live_at + column] = 1
                return column
        return None

    def _note_claimed(self, column: int) -> None:
        # Two processes must not overwrite each other's. If the lock is taken or fails, all columns are read.
        lock = self.columns + 1
        if self._lock(lock):
            try:
                self.words[CLAIMED] = max(self.words[CLAIMED], column + 1)
            finally:
                fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, lock)
        else:
            self.words[CLAIMED] = self.columns

    def clear_dead(self) -> int:
        """Make what dead processes had open count no more; return their number. A system call per live process."""
        cleared = 0
        at = self.data.find(b"\1", self.live_at, self.live_at + self.columns)
        while at >= 0:
            column = at - self.live_at
            if self._lock(column):
                try:
                    self.begin_epoch(column)
                    self.data[at] = 0
                    cleared += 1
                finally:
                    fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, column)
            at = self.data.find(b"\1", at + 1, self.live_at + self.columns)
        return cleared

    def _lock(self, column: int) -> bool:
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, column)
        except OSError:  # EAGAIN: another process has it. ENOLCK: unknown
            return False
        return True

    def begin_epoch(self, column: int) -> None:
        """Make what the process of a column had open count no more. Call only with its lock."""
        self.words[self.epochs_at + column] = (self.words[self.epochs_at + column] + 1) & 0x7FFFFFFF
        for name in GAUGES:
            self.words[self.number_at(name) + column] = 0

    # -- who speaks for all ------------------------------------------------------------------------------------------

    def take_turn(self) -> bool:
        """Return whether this process is the one that logs what all of them notice; it is until `end_turn`."""
        return self._lock(self.columns + 2)

    def end_turn(self) -> None:
        """Let the next process take the turn. The end of the process does it, too."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, self.columns + 2)

    # -- keys of TLS tickets -----------------------------------------------------------------------------------------

    def ticket_version(self) -> int:
        """Return a number that changes with the secrets."""
        return self.words[self.tickets_at // 8]

    def ticket_secrets(self) -> tuple[bytes, bytes | None]:
        """Return the secret for the keys of new tickets, and the one before it; None: there was none."""
        version = self.ticket_version()
        return self._secret(version), self._secret(version - 1) if version else None

    def _secret(self, version: int) -> bytes:
        at = self.tickets_at + 16 + version % TICKET_SECRETS * KEY_BYTES
        return self.data[at : at + KEY_BYTES]

    def rotate_tickets(self, after: float = 0.0) -> bool:
        """Make a new secret. Tickets of the one before stay valid, older ones do not.

        Args:
            after: seconds that the present one is used at least.

        Returns:
            False if it is younger, or another master does it.
        """
        at = self.tickets_at // 8
        if self._is_young(at, after) or not self._lock(self.columns):
            return False
        try:
            if self._is_young(at, after):
                return False
            version = (self.words[at] + 1) & 0x7FFFFFFF
            place = self.tickets_at + 16 + version % TICKET_SECRETS * KEY_BYTES
            self.data[place : place + KEY_BYTES] = os.urandom(KEY_BYTES)
            self.words[at + 1] = monotonic_ns()
            self.words[at] = version
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, self.columns)
        return True

    def _is_young(self, at: int, after: float) -> bool:
        # A time in the future is damage: it must not keep for good the secrets that a compromised worker has read.
        return 0 <= monotonic_ns() - self.words[at + 1] < after * 1e9

    # -- numbers -----------------------------------------------------------------------------------------------------

    def number_at(self, name: str) -> int:
        """Return the index of the first word of a number."""
        return self.numbers_at + NUMBERS.index(name) * self.columns

    def close(self) -> None:
        """Close the descriptor; the memory stays mapped. In the process that has a column, this releases it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_descriptor(fd)


def columns_for(workers: int) -> int:
    """Return the number of columns for this number of workers: a power of two."""
    return min(MOST_COLUMNS, max(LEAST_COLUMNS, 1 << (COLUMNS_PER_WORKER * workers - 1).bit_length()))


def clients_of(columns: int) -> int:
    """Return the number of clients that a memory of this width holds: a power of two."""
    return max(LEAST_CLIENTS, min(MOST_CLIENTS, ENTRIES // columns))


def size_of(columns: int, sets: int) -> int:
    """Return the bytes of a memory."""
    words = _HEADER_WORDS + 2 + (1 + TICKET_SECRETS) * KEY_BYTES // 8 + columns // 8 + (1 + len(NUMBERS)) * columns
    return 8 * (words + sets * columns * WAYS * (1 + WORDS))


def _is_power_of_two(number: int, least: int, most: int) -> bool:
    return least <= number <= most and number & (number - 1) == 0


def make_memory(workers: int, fd: int | None = None) -> SharedMemory:
    """Return the memory that another master handed over, or an empty one.

    Args:
        workers: number of workers to expect.
        fd: the descriptor of the other master's memory; None: there is none.

    Raises:
        OSError: as `SharedMemory.make`.
    """
    if fd is not None:
        try:
            return SharedMemory.adopt(fd)
        except (OSError, ValueError, GtcpServerError) as error:
            log.warning("the limits of clients begin to count anew: %s", error)
            close_descriptor(fd)
    return SharedMemory.make(workers)
