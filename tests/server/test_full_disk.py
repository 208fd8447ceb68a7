"""Log files on a disk that was full: they go on at the start of a line, and say how many lines were lost."""

import subprocess
import sys

from kit.patience import SOON

# RLIMIT_FSIZE cuts a write in its midst, as a full disk does.
CODE = """
import logging, os, resource, sys
from gtcpserver.server.access_log import AccessFile

path = sys.argv[1]
writers = [AccessFile(path) for _ in range(3)]
for writer in writers:
    writer.setFormatter(logging.Formatter("%(message)s"))

def write(number, text):
    writers[number].emit(logging.LogRecord("x", logging.INFO, "", 0, text, None, None))

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

write(0, "first" * 10)
room(os.path.getsize(path) + 20)
for number in (0, 1, 0):
    write(number, f"lost {number}" * 10)
room(os.path.getsize(path) + 60)
write(0, "lost too " * 10)  # behind the notice
room(resource.RLIM_INFINITY)
write(2, "third")  # which has lost nothing
write(1, "second")
write(0, "last")
"""


def test_a_file_goes_on_at_a_line_when_there_is_room_again(tmp_path):
    path = tmp_path / "access.log"
    done = subprocess.run([sys.executable, "-c", CODE, path], capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    assert path.read_text().splitlines() == [
        "first" * 10,
        "2 log lines dropped: File too large",
        "third",
        "1 log line dropped: File too large",
        "second",
        "1 log line dropped: File too large",
        "last",
    ]
