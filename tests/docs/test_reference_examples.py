"""Each entry of docs/reference has an example, which runs, and does what CHECKS says.

An example is a block behind "Example:", in the docstring or in the page. What a comment behind `print(...)` says is
what must be printed (`...`: anything). Addresses 10.0.0.x are a backend that echoes; 127.0.0.1 is this host, on a
free port.
"""

import ast
import importlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import gevent
import pytest

from gtcpserver import Acceptor, ConnectionPool, Server
from gtcpserver.monitoring import Monitor
from gtcpserver.server.server import State
from gtcpserver.testing import connect, serving
from kit.doc_blocks import matches
from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port
from kit.reference_cases import ALONE, CHECKS, GIVEN

ENTRY = re.compile(r"^\.\. auto(class|function|exception):: (gtcpserver\S+)\n((?:(?:   .*)?\n)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:(?::|\n\n\.\. code-block:: python)\n\n((?:(?:    .*)?\n)+)", re.MULTILINE)
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)

#: Where servers of the examples listen.
OWN = re.compile(r"(127\.0\.0\.1:|\"127\.0\.0\.1\", )(?:1080|5000|8000|8443|9100|9443)\b")

#: Longest example in lines, blank ones left out: more is for the how-to pages.
LONGEST = 13


def entries():
    """Names in the reference, with the text of each: its docstring, and what the page adds."""
    for page in sorted(ROOT.glob("docs/reference/*.md")):
        for _, name, added in ENTRY.findall(page.read_text()):
            module, _, attribute = name.rpartition(".")
            thing = getattr(importlib.import_module(module), attribute)
            yield name, f"{inspect_doc(thing)}\n\n{textwrap.dedent(added)}\n"


def inspect_doc(thing):
    first, _, rest = (thing.__doc__ or "").partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}"


def find_example(text):
    found = EXAMPLE.search(text)
    return textwrap.dedent(found[1]).strip() + "\n" if found else ""


EXAMPLES = {name: find_example(text) for name, text in entries()}


def test_every_entry_has_an_example():
    assert [name for name, code in EXAMPLES.items() if not code] == []


def test_examples_are_short():
    lines = {name: sum(bool(line) for line in code.splitlines()) for name, code in EXAMPLES.items()}
    assert {name: number for name, number in lines.items() if number > LONGEST} == {}


def test_functions_of_examples_are_checked():
    """An example that only defines functions would be true whatever they do."""
    assert [name for name in CHECKS if name not in EXAMPLES] == []
    assert [name for name in GIVEN if name not in EXAMPLES] == []
    for name, code in EXAMPLES.items():
        defined = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        if any(not function.startswith("test_") for function in defined):
            assert name in CHECKS or name in ALONE, f"{name}: CHECKS does not say what {defined} do"


# -- run ---------------------------------------------------------------------------------------------------------------


def echo(conn):
    while data := conn.recv(65536):
        conn.sendall(data)


def exchange(server, sent, answer, **options):
    """A client of a started server, or of a handler, that sends and must get the answer; None: nothing."""
    if not isinstance(server, Server):
        with serving(server) as started:
            exchange(started, sent, answer, **options)
        return
    with connect(server, **options) as client:
        client.sendall(sent)
        client.half_close()
        assert client.recv_all() == (answer or b"")


def fill(folder):
    """Files that examples name."""
    (folder / "www").mkdir()
    (folder / "www" / "index.html").write_text("<p>hello</p>")
    (folder / "app.py").write_text("def handle(conn): pass\n")


@pytest.fixture(scope="module")
def certificates():
    pytest.importorskip("trustme")
    from gtcpserver.testing import certificates

    with certificates() as made:
        yield made


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_certificates(request, folder):
    made = request.getfixturevalue("certificates")
    for name, file in (("cert.pem", made.certfile), ("key.pem", made.keyfile), ("ca.pem", made.ca_file)):
        shutil.copy(file, folder / name)
    return made


def here(code, backend):
    return re.sub(r"\b10\.0\.0\.\d:\d+", backend, OWN.sub(r"\g<1>0", code))


def check_printed(name, code, printed):
    lines = printed.splitlines()
    for wanted in PRINTED.findall(code):
        assert any(matches(wanted, line) for line in lines), f"{name} prints\n{printed}\nand not\n{wanted}"


#: The master of this one is that of another example.
ASKED = "gtcpserver.supervisor.ask"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, code in EXAMPLES.items() if code and name != ASKED])
def test_example(name, folder, request, capsys):
    code, given, check = EXAMPLES[name], GIVEN.get(name, ""), CHECKS.get(name, "")
    names = {
        "__name__": "example",
        "echo": echo,
        "handle": echo,
        "exchange": exchange,
        "folder": folder,
        "gevent": gevent,
    }
    if "cert.pem" in code or "made" in given + check:
        names["made"] = with_certificates(request, folder)
    if name in ALONE:
        run_alone(name, code, folder)
        return
    with gevent.Timeout(SOON), Server("127.0.0.1:0", echo) as backend:
        try:
            for text in (given, code, check):
                start_servers(names)
                exec(compile(here(text, str(backend.address)), "app.py", "exec"), names)
            for function in [names[function] for function in names if function.startswith("test_")]:
                function()
        finally:
            stop_all(names)
    check_printed(name, code, capsys.readouterr().out)


def start_servers(names):
    for thing in list(names.values()):
        if isinstance(thing, Server) and thing.state is State.NEW:
            thing.start()


def stop_all(names):
    for thing in list(names.values()):
        if isinstance(thing, Server):
            thing.stop(timeout=SOON)
        elif isinstance(thing, (Acceptor, Monitor)):
            thing.stop()
        elif isinstance(thing, ConnectionPool):
            thing.close()


def run_alone(name, code, folder):
    """In a process of its own, which must serve until SIGTERM, and end with status 0."""
    port = free_port()
    code = OWN.sub(rf"\g<1>{port}", code)
    given = f"import sys; sys.path.insert(0, {str(ROOT)!r})\ndef handle(conn): conn.sendall(conn.recv(100))\n"
    (folder / "alone.py").write_text(given + code)
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, "alone.py"], cwd=folder, stdout=log, stderr=log)
        try:
            wait_until_served(process, port)
            if name == "gtcpserver.supervisor.Master":
                exec(EXAMPLES[ASKED], {})
            process.send_signal(signal.SIGTERM)
            status = process.wait(SOON)
            # gevent's StreamServer ends by the signal, and so does ours, once its connections have ended.
            assert status == (-signal.SIGTERM if name == "gtcpserver.StreamServer" else 0), (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()
    check_printed(name, code, (folder / "log").read_text())


def wait_until_served(process, port):
    give_up = time.monotonic() + SOON
    while time.monotonic() < give_up:
        assert process.poll() is None, "the example has ended"
        try:
            client = socket.create_connection(("127.0.0.1", port), SOON)
        except OSError:
            time.sleep(0.02)
            continue
        with client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b"hello"
        return
    pytest.fail("the example does not listen")
