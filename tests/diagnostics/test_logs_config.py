"""A program that sets up logging does not silence the server by it."""

import logging
import logging.config
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gtcpserver.diagnostics.logs import own_logger
from kit.patience import SOON
from kit.supervised import Master, wait_until

APP = """
import logging, logging.config

DICT = {"version": 1, "handlers": {"own": {"class": "logging.StreamHandler"}}, "root": {"handlers": ["own"]}}
NAMED = {**DICT, "loggers": {"gtcpserver": {"level": "INFO"}}}
FILE = '''
[loggers]
keys=root
[handlers]
keys=own
[formatters]
keys=
[logger_root]
level=NOTSET
handlers=own
[handler_own]
class=StreamHandler
args=()
'''

def configure():
    if HOW == "file":
        with open("logging.ini", "w") as file:
            file.write(FILE)
        logging.config.fileConfig("logging.ini")
    else:
        config = NAMED if HOW == "named" else DICT
        config["root"]["level"] = "INFO"
        logging.config.dictConfig(config)

def on_connect(conn):
    if WHERE == "handler":
        configure()

def handler(conn):
    conn.sendall(b"hello")
    raise ValueError("a fault")

if WHERE == "import":
    configure()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers=1",)], ids=["single", "workers"])
@pytest.mark.parametrize(
    ("how", "where"), [("dict", "import"), ("named", "import"), ("file", "import"), ("dict", "handler")]
)
def test_faults_and_access_lines_are_written(tmp_path, workers, how, where):
    (tmp_path / "app.py").write_text(f"HOW, WHERE = {how!r}, {where!r}\n{APP}")
    options = ("--on-connect=app:on_connect", "--access-log=text", "--access-log-file=access")
    server = Master(tmp_path, ("serve", "app:handler", "--bind=127.0.0.1:0", *options, *workers))
    try:
        # Of a single process, the line comes after the program is loaded.
        server.wait_for("listening on")
        server.port = int(re.search(r"listening on 127.0.0.1:(\d+)", server.log())[1])
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", server.port), SOON) as client:
                assert client.recv(100) == b"hello"
        server.wait_for("ValueError: a fault", 2)
        wait_until(lambda: (tmp_path / "access").read_text().count("result=error") == 2)
    finally:
        server.process.terminate()
        assert server.process.wait(SOON) == 0


PROGRAM = """
import logging.config, gtcpserver
logging.config.dictConfig(
    {"version": 1, "handlers": {"own": {"class": "logging.StreamHandler"}}, "root": {"handlers": ["own"]}}
)
for name in list(logging.root.manager.loggerDict):
    if name.startswith("gtcpserver"):
        logging.getLogger(name).error("heard %s", name)
logging.getLogger("gtcpserver.access").disabled = True
logging.getLogger("gtcpserver.access").error("not heard")
"""


@pytest.mark.slow
def test_a_program_that_imports_the_library_before_it_sets_up_logging_hears_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    for name in ("gtcpserver", "gtcpserver.access", "gtcpserver.tls", "gtcpserver.accept"):
        assert f"heard {name}\n" in done.stderr
    assert "not heard" not in done.stderr


def test_levels_and_handlers_that_the_program_gives_our_loggers_stay():
    logger = own_logger("gtcpserver.of_this_test")
    config = {
        "version": 1,
        "disable_existing_loggers": True,
        "handlers": {"nothing": {"class": "logging.NullHandler"}},
        "loggers": {logger.name: {"level": "ERROR", "handlers": ["nothing"], "propagate": False}},
    }
    root = logging.getLogger()
    before = root.handlers[:], root.level, {name: one.disabled for name, one in _loggers()}
    try:
        logging.config.dictConfig(config)
        assert (logger.level, logger.propagate, len(logger.handlers)) == (logging.ERROR, False, 1)
        del config["loggers"]
        logging.config.dictConfig(config)  # of what it does not name it changes nothing
        assert (logger.level, logger.propagate, len(logger.handlers)) == (logging.ERROR, False, 1)
        logger.disabled = True
        assert not logger.isEnabledFor(logging.ERROR)
    finally:
        root.handlers[:], root.level = before[:2]
        for name, disabled in before[2].items():
            logging.getLogger(name).disabled = disabled


def _loggers():
    return [(name, one) for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)]


def test_a_logger_class_of_the_program_stays():
    class Own(logging.getLoggerClass()):
        def shout(self):
            return "own"

    usual = logging.getLoggerClass()
    logging.setLoggerClass(Own)
    try:
        logger = own_logger("gtcpserver.of_a_class_of_its_own")
    finally:
        logging.setLoggerClass(usual)
    assert logger.shout() == "own"
    assert own_logger(logger.name) is logger


@pytest.mark.slow
def test_every_logger_of_the_library_is_one_that_stays():
    package = Path(sys.modules["gtcpserver"].__file__).parent
    for path in package.rglob("*.py"):
        assert not re.search(r'getLogger\(f?"gtcpserver\.', path.read_text()), path
