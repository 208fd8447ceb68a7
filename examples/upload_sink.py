"""Receive files: a line with name and size, then the content, which goes from the socket into the file by splice(2).

    UPLOADS=/tmp python examples/upload_sink.py [ADDRESS], then:
    (printf 'PUT notes.txt 6\\n'; printf 'hello\\n') | nc -N 127.0.0.1 5000

Each file is answered with "STORED name size" or "ERROR why". A file only appears under its name once it is complete.
"""

import os
import re
import sys
import tempfile

from gtcpserver import Connection, EarlyEOF, run

UPLOADS = os.environ.get("UPLOADS", ".")

LARGEST = 10 << 30

# No slash, no leading dot, no option-like name: nothing outside the directory, nothing hidden.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def take_files(conn: Connection) -> None:
    conn.settimeout(60)
    while True:
        try:
            with conn.idle():
                line = conn.recv_until(b"\n", limit=200)
        except EarlyEOF:
            return
        words = line.decode("ascii", "replace").split()
        try:
            command, name, size = words
            if command != "PUT" or not NAME.fullmatch(name) or not 0 <= int(size) <= LARGEST:
                raise ValueError
        except ValueError:
            # The start of the next command is unknown.
            conn.sendall(b"ERROR expected: PUT name size\n")
            return
        try:
            store(conn, name, int(size))
        except EarlyEOF as error:
            conn.sendall(f"ERROR {error}\n".encode())
            return
        conn.sendall(f"STORED {name} {size}\n".encode())


def store(conn: Connection, name: str, size: int) -> None:
    fd, path = tempfile.mkstemp(dir=UPLOADS, prefix=".upload-")
    try:
        with open(fd, "wb") as file:
            taken = conn.recv_to_file(file, size)
        if taken < size:
            raise EarlyEOF(f"{name}: {taken} of {size} bytes came", b"")
        os.chmod(path, 0o644)
        os.replace(path, os.path.join(UPLOADS, name))
    except BaseException:  # a kill, a timeout, a full disk: leave no partial file
        os.unlink(path)
        raise


if __name__ == "__main__":
    run(take_files, *sys.argv[1:])
