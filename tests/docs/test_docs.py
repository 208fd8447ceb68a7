"""Each code block of README.md and docs/ does what the page says; what is done with which is in kit/doc_blocks.py."""

import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import click
import pytest

import gtcpserver
from gtcpserver.cli import commands
from gtcpserver.errors import ConfigError
from kit.doc_blocks import (
    PORT,
    Block,
    begins,
    command_lines,
    find_blocks,
    find_ports,
    matches,
    replace_ports,
    steps,
)
from kit.doc_fresh import make_machine, run_in_terminal, run_setup
from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)
BIN = Path(sys.executable).parent

#: Pages that are typed from an empty folder, on a machine with nothing of the tests: see kit/doc_fresh.py.
TYPED = ("docs/learn/get-started.md", "docs/learn/tutorial.md")

SERVES = re.compile(r"gtcpserver (serve|echo|files|forward|proxy)\b(?! (check|hash-password|import))|.*&$", re.DOTALL)
SERVES_IN_PYTHON = re.compile(r"^[^#\n]*\b(serve_forever\(|run\(\s*[\w\"])", re.MULTILINE)

RUN = ("console", "python")

#: Programs from Debian that console blocks use.
PROGRAMS = ("curl", "haproxy", "nc", "ncat", "openssl", "redis-benchmark", "redis-cli")


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """cert.pem and key.pem for localhost, ca.pem; client.pem with a key and a certificate of the same CA."""
    trustme = pytest.importorskip("trustme")
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1")
    server.private_key_pem.write_to_path(folder / "key.pem")
    for number, part in enumerate(server.cert_chain_pems):
        part.write_to_path(folder / "cert.pem", append=bool(number))
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.issue_cert("ada@example.com", common_name="Ada").private_key_and_cert_chain_pem.write_to_path(
        folder / "client.pem"
    )
    return folder


class Place:
    """Where the blocks of one page run: a folder, ports that are free, and the servers that are up."""

    python = sys.executable
    # Only our own plugin: to load the others of this environment (hypothesis) takes longer than most blocks.
    pytest = ("-m", "pytest", "-q", "--rootdir=.", "-p", "gtcpserver", "-p", "no:cacheprovider")
    first_lines = "from kit.doc_helpers import talk\n"
    stop_signal = signal.SIGTERM

    def __init__(self, folder, certificates, ports):
        self.folder = folder
        self.ports = ports
        self.servers = []
        for file in certificates.iterdir():
            shutil.copy(file, folder)
        for name in ("examples", "loadtests"):
            (folder / name).symlink_to(ROOT / name)
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(
                map(str, (ROOT, *(ROOT / name for name in ("tests", "loadtests", "examples"))))
            ),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }

    def start(self, command, ours=True):
        log = open(self.folder / f"log-{len(self.servers)}", "w+b")  # noqa: SIM115
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        self.servers.append((process, log, ours))
        return process, log

    def run(self, words, seconds):
        return subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )

    def stop(self):
        """All servers must end in order."""
        while self.servers:
            process, log, ours = self.servers.pop()
            process.send_signal(self.stop_signal)
            try:
                status = process.wait(SOON)
            except subprocess.TimeoutExpired:
                status = "still running"
            output = read(log)
            log.close()
            # Others' programs may have no such thing as an orderly end.
            assert status in ((0,) if ours else (0, -self.stop_signal)), f"{process.args}: {status}\n{output}"

    def kill(self):
        for process, log, _ in self.servers:
            process.kill()
            process.wait()
            log.close()


class FreshPlace(Place):
    """The same for a page that is typed: with nothing but what the page makes, installs and says, in a terminal."""

    python = "python"
    pytest = ("-m", "pytest", "-q")
    first_lines = ""
    stop_signal = signal.SIGINT

    def __init__(self, folder, ports):
        self.folder = folder
        self.ports = ports
        self.servers = []
        self.environment = make_machine(folder)

    def run(self, words, seconds):
        return run_in_terminal(words, self.folder, self.environment, seconds)

    def enter(self, block):
        """Run the lines that make the folder and the environment."""
        try:
            self.folder, self.environment = run_setup(block.code, self.folder, self.environment, 2 * SOON)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.fail(f"{block}: {error}")

    def check_told(self, block):
        """The reader must be told what marks tell the tests."""
        hidden = {"not run", "given", "then", "continues"} & block.marks.keys()
        assert not hidden, f"{block} is typed by the reader, who sees nothing of {hidden}"
        if "restart" in block.marks:
            assert "Ctrl-C" in block.before, f"{block}: the reader is not told to stop the last server"
        if "file" in block.marks:
            assert f"`{block.marks['file']}`" in block.before, f"{block}: the reader is not told where to save this"


def read(log):
    log.flush()
    return Path(log.name).read_text(errors="replace")


@pytest.fixture
def short_path():
    """A reader's folder has a short name, and a control socket's path at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="doc") as folder:
        yield Path(folder)


@pytest.fixture
def place(request, tmp_path, short_path, certificates):
    path = request.node.callspec.params["path"]
    ports = {port: free_port() for port in sorted(find_ports(path.read_text()))}
    place = FreshPlace(short_path, ports) if name_of(path) in TYPED else Place(tmp_path, certificates, ports)
    yield place
    place.kill()


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_blocks_of_page_do_what_it_says(path, place):
    blocks = find_blocks(path)
    used = " ".join(word for block in blocks for word in re.findall(r"[a-z-]+", block.code) if block.language in RUN)
    for program in PROGRAMS:
        if f" {program} " in f" {used} " and not shutil.which(program):
            pytest.skip(f"{program} is missing, which {path.name} uses")
    script, left_out = "", []
    for number, block in enumerate(blocks):
        block.code = replace_ports(block.code, place.ports)
        marks = block.marks
        if isinstance(place, FreshPlace):
            place.check_told(block)
        if "needs" in marks and importlib.util.find_spec(marks["needs"]) is None:
            left_out.append(f"{block} needs {marks['needs']}")
        elif "file" in marks:
            write_file(place, block, blocks[number + 1 :])
            if block.language == "python":
                compile(block.code, str(block), "exec")
        elif "checked by" in marks:
            (place.folder / "block").write_text(block.code)
            run_command(place, block, marks["checked by"].format(file="block"), None)
        elif block.language == "python" and "not run" not in marks:
            hidden = [replace_ports(marks.get(mark, ""), place.ports) for mark in ("given", "then")]
            code = f"{hidden[0]}\n{block.code}\n{hidden[1]}\n"
            script = script + code if "continues" in marks else code
            run_python(place, block, script)
        elif block.language == "sh" and isinstance(place, FreshPlace):
            place.enter(block)
        elif block.language in ("", "sh", "bash", "shell"):
            check_commands(block)
        elif block.language == "console" and "not run" not in marks:
            run_console(place, block)
        elif block.language == "json":
            json.loads(block.code)
        elif block.language not in ("text", "indented") and not marks.get("not run"):
            pytest.fail(f"{block} is neither run nor marked: see tests/kit/doc_blocks.py")
    place.stop()
    if left_out:
        pytest.skip(f"all of the page was run but {', '.join(left_out)}")


def write_file(place, block, later):
    name = block.marks["file"]
    path = place.folder / name
    before = path.stat().st_mtime if path.exists() else None
    path.write_text(block.code)
    if before is not None:
        # Nobody types it anew within a second, in which Python would take what it has compiled for that of this file.
        os.utime(path, (before + 2, before + 2))
    stem = name.removesuffix(".py")
    assert f"`{name}`" in block.path.read_text(), f"{block}: the reader is not told that this is {name}"
    assert any(re.search(rf"\b{re.escape(stem)}\b", other.code) for other in later), f"{block}: {name} is never used"


def run_python(place, block, code):
    source = place.folder / f"block-{block.line}.py"
    source.write_text(place.first_lines + code)
    tests = re.search(r"^def test_", code, re.MULTILINE)
    process, log = place.start([place.python, *(place.pytest if tests else ()), source])
    if SERVES_IN_PYTHON.search(code):
        wait_until_listening(process, log, [int(port) for port in PORT.findall(code)], block)
        process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(SOON)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{block} does not end:\n{read(log)}")
    place.servers.remove((process, log, True))
    assert status == 0, f"{block} ended with status {status}:\n{read(log)}"
    log.close()


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_listening(process, log, ports, block):
    assert ports, f"{block} serves on no port that is known"
    give_up = time.monotonic() + SOON
    while True:
        assert process.poll() is None, f"{block} has ended:\n{read(log)}"
        assert time.monotonic() < give_up, f"{block} does not listen on one of {ports}:\n{read(log)}"
        for port in ports:
            try:
                client = socket.create_connection(("127.0.0.1", port), SOON)
            except OSError:
                time.sleep(0.02)
                continue
            with client:
                # It listens before it serves, and before it has handlers for signals: wait until it has taken notice.
                client.shutdown(socket.SHUT_WR)
                client.recv(1)
            return


def run_console(place, block):
    if "restart" in block.marks:
        place.stop()
    wanted = steps(block.code)
    for number, step in enumerate(wanted):
        if SERVES.match(step.command) or serves_in_python(place, step.command):
            run_server(place, block, step)
        else:
            fails = "fails" in block.marks and number == len(wanted) - 1
            run_command(place, block, step.command, step.output, fails)


def serves_in_python(place, command):
    match = re.match(r"python (\S+\.py)", command)
    return match is not None and SERVES_IN_PYTHON.search((place.folder / match[1]).read_text()) is not None


def run_server(place, block, step):
    command = step.command.removesuffix("&").strip()
    files = [place.folder / word for word in command.split() if (place.folder / word).is_file()]
    text = command + "".join(file.read_text() for file in files)
    # The configuration of a balancer names the servers behind it, too, which listen already.
    ports = [port for port in map(int, PORT.findall(text)) if not listens(port)]
    process, log = place.start(["bash", "-c", f"exec {command}"], ours="gtcpserver" in text)
    if command.startswith("gtcpserver"):
        wait_for(process, block, command, lambda: "listening on" in read(log), log)
    else:
        wait_until_listening(process, log, ports, block)
    if step.output:
        wait_for(process, block, command, lambda: begins(step.output, read(log)), log)


def wait_for(process, block, command, condition, log):
    give_up = time.monotonic() + SOON
    while not condition():
        assert process.poll() is None, f"{block}: {command} has ended:\n{read(log)}"
        assert time.monotonic() < give_up, f"{block}: {command} does not say what it should:\n{read(log)}"
        time.sleep(0.02)


def run_command(place, block, command, output, fails=False):
    try:
        done = place.run(["bash", "-o", "pipefail", "-c", command], 2 * SOON)
    except subprocess.TimeoutExpired as error:
        logs = "\n".join(read(log) for _, log, _ in place.servers)
        pytest.fail(f"{block}: {command} does not end: {error.output}\n{logs}")
    said = done.stdout.decode(errors="replace")
    logs = "\n".join(read(log) for _, log, _ in place.servers)
    assert (done.returncode != 0) is fails, f"{block}: {command} ended with status {done.returncode}: {said}\n{logs}"
    if output is not None:
        assert matches(output, said), f"{block}: {command}\nexpected:\n{output}\ngot:\n{said}\n{logs}"


# -- commands that are checked, not run --------------------------------------------------------------------------------


def check_commands(block):
    for line in command_lines(block.code):
        words = shlex.split(line, comments=True)
        for environment, command in split(words):
            check = CHECKS.get(Path(command[0]).name)
            if check is not None:
                with patch.dict(os.environ, environment):
                    check(block, command)
            elif not block.marks.get("not run"):
                pytest.fail(f"{block}: {line!r} is neither run nor marked: see tests/kit/doc_blocks.py")


def split(words):
    """At pipes and lists; the variables before each command, and its words."""
    commands = [({}, [])]
    for word in words:
        environment, command = commands[-1]
        if word in ("|", "&&", "||", ";", "&"):
            commands.append(({}, []))
        elif not command and re.match(r"[A-Z_]+=", word):
            name, _, value = word.partition("=")
            environment[name] = value
        else:
            command.append(word)
    return [command for command in commands if command[1]]


def check_gtcpserver(block, words):
    """Options and arguments, by the command's own parser."""
    command, arguments, context = commands.gtcpserver, words[1:], None
    name = "gtcpserver"
    try:
        while True:
            context = command.make_context(name, list(arguments), parent=context)
            protected = context._protected_args if isinstance(command, click.Group) else []  # noqa: SLF001  no public name
            rest = [*protected, *context.args] if isinstance(command, click.Group) else []
            if not rest:
                return
            name, command, arguments = command.resolve_command(context, rest)
    except click.exceptions.Exit:
        return  # --help, --version
    except click.ClickException as error:
        pytest.fail(f"{block}: {shlex.join(words)}: {error.format_message()}")
    except ConfigError as error:
        # A command may be shown before the file that it reads.
        if "No such file" not in str(error):
            pytest.fail(f"{block}: {shlex.join(words)}: {error}")


def check_make(block, words):
    makefile = (ROOT / "Makefile").read_text()
    for target in (word for word in words[1:] if "=" not in word and not word.startswith("-")):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{block}: make has no target {target}"


def check_pip(block, words):
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for word in words[2:]:
        for extra in re.findall(r"(?:\.|gtcpserver)\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= set(extras), f"{block}: there is no extra {extra}"


def check_python(block, words):
    """The module or file is there, and has the options."""
    if words[1] == "-m":
        module = ROOT / words[2].replace(".", "/")
        source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        given = words[3:]
    else:
        source, given = ROOT / words[1], words[2:]
    assert source.exists(), f"{block}: there is no {source}"
    sources = [source, ROOT / "loadtests/bench/turns.py"]
    if source.name == "__main__.py":  # may leave the options to a module beside it
        names = re.findall(r"^from \.(\w+) import", source.read_text(), re.MULTILINE)
        sources += [source.with_name(f"{name}.py") for name in names]
    known = "".join(path.read_text() for path in sources)
    for option in (word.partition("=")[0] for word in given if word.startswith("--")):
        # "--no-x" is made of "--x" (argparse.BooleanOptionalAction).
        names = {f'"{option}"', f'"--{option.removeprefix("--no-")}"'}
        assert any(name in known for name in names), f"{block}: {source.name} has no option {option}"


def check_locust(block, words):
    sources = "".join(path.read_text() for path in ROOT.glob("loadtests/load/*.py"))
    for word, value in zip(words[1:], [*words[2:], ""], strict=True):
        if word == "-f":
            assert (ROOT / value).exists(), f"{block}: there is no {value}"
        elif word.startswith("--"):
            names = (f'"{word}"', f'"{word[2:].replace("-", "_")}"')  # as an option, or as what one is made of
            assert word in LOCUSTS_OWN or any(name in sources for name in names), f"{block}: no option {word}"


LOCUSTS_OWN = ("--headless", "--html", "--processes", "--master", "--worker", "--expect-workers", "--master-host",
               "--web-host", "--class-picker", "--users", "--spawn-rate", "--run-time")  # fmt: skip

CHECKS = {
    "gtcpserver": check_gtcpserver,
    "locust": check_locust,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
}


# -- links and the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", path.read_text()):
        target = link[0] or link[1]
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path}: {target} is not there"


def reference_names():
    text = "".join(path.read_text() for path in ROOT.glob("docs/reference/*.md"))
    return re.findall(r"^\.\. auto\w+:: (gtcpserver\S+)$", text, re.MULTILINE)


def test_every_public_name_is_in_the_reference():
    listed = [name.removeprefix("gtcpserver.") for name in reference_names()]
    assert set(gtcpserver.__all__) - set(listed) == set()
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "module",
    ["gtcpserver.tls", "gtcpserver.supervisor", "gtcpserver.adapters", "gtcpserver.monitoring", "gtcpserver.testing"],
)
def test_every_class_and_function_of_a_public_module_is_in_the_reference(module):
    __import__(module)
    found = sys.modules[module]
    listed = set(reference_names())
    for name in found.__all__:
        thing = getattr(found, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert {f"{module}.{name}", f"gtcpserver.{name}"} & listed, f"{module}.{name}"


# -- the test itself ---------------------------------------------------------------------------------------------------


def page(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_a_block_in_an_unknown_language_is_told(tmp_path, certificates):
    path = page(tmp_path, "```ini\n[Unit]\n```\n")
    (tmp_path / "place").mkdir()
    with pytest.raises(pytest.fail.Exception, match="neither run nor marked"):
        test_blocks_of_page_do_what_it_says(path, Place(tmp_path / "place", certificates, {}))


@pytest.mark.slow
def test_tests_in_a_block_are_run_with_what_is_given(tmp_path, certificates):
    block = "<!-- given: x = 1 -->\n```python\ndef test_it():\n    assert x == %d\n```\n"
    (tmp_path / "place").mkdir()
    place = Place(tmp_path / "place", certificates, {})
    test_blocks_of_page_do_what_it_says(page(tmp_path, block % 1), place)
    with pytest.raises(AssertionError, match="1 failed"):
        test_blocks_of_page_do_what_it_says(page(tmp_path, block % 2), place)


@pytest.mark.slow
def test_a_block_that_fails_is_told(tmp_path, certificates):
    path = page(tmp_path, "```python\nx = 1\n```\n\n<!-- continues -->\n\n```python\nassert x == 2, 'not two'\n```\n")
    (tmp_path / "place").mkdir()
    with pytest.raises(AssertionError, match=r"page\.md:7 \(python\)(.|\n)*not two"):
        test_blocks_of_page_do_what_it_says(path, Place(tmp_path / "place", certificates, {}))


def test_output_that_differs_is_told(tmp_path, certificates):
    path = page(tmp_path, "```console\n$ echo one\none\n$ printf 'a\\nb\\n'\na\n...c\n```\n")
    (tmp_path / "place").mkdir()
    with pytest.raises(AssertionError, match="expected"):
        test_blocks_of_page_do_what_it_says(path, Place(tmp_path / "place", certificates, {}))


@pytest.mark.parametrize(
    "line",
    [
        "gtcpserver serve --no-such x:y",
        "gtcpserver ctl frobnicate",
        "pip install '.[no]'",
        "make nothing",
        "rm -rf /",
        "locust --no-such",
        "python -m loadtests.bench --slow",
    ],
)
def test_a_command_that_cannot_be_is_told(tmp_path, line):
    block = Block(tmp_path / "page.md", 1, "sh", line)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=r"page\.md"):
        check_commands(block)


def test_a_mark_that_marks_nothing_is_told(tmp_path):
    with pytest.raises(AssertionError, match="not right before"):
        find_blocks(page(tmp_path, "<!-- not run: why -->\n\nText.\n\n```ini\n```\n"))


# -- pages that are typed ----------------------------------------------------------------------------------------------

SETUP = "```sh\nmkdir new\ncd new\npython3 -m venv .venv\n. .venv/bin/activate\npip install '../gtcpserver%s'\n```\n\n"


def typed(tmp_path, text):
    (tmp_path / "place").mkdir()
    place = FreshPlace(tmp_path / "place", {})
    try:
        test_blocks_of_page_do_what_it_says(page(tmp_path, text), place)
    finally:
        place.kill()


@pytest.mark.slow
def test_a_typed_page_has_what_it_installs(tmp_path):
    text = (
        "```console\n$ ls -A\n.venv\n$ python -c 'import gtcpserver, click'\n$ [ -t 1 ] && gtcpserver --version\n"
        "gtcpserver...\n$ pip install 'gtcpserver[metrics]'\n$ python -c 'import prometheus_client'\n```\n"
    )
    typed(tmp_path, SETUP % "[cli]" + text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "python\nimport pytest",
        "python\nimport prometheus_client",
        "python\nimport kit",
        "python\nimport echo",  # of examples/
        "console\n$ python -m pytest --version",
        "console\n$ cat cert.pem",
        "console\n$ gtcpserver --version",  # it has no click
        "console\n$ pip install no-such-distribution",
    ],
)
def test_a_typed_page_has_nothing_else(tmp_path, code):
    with pytest.raises(AssertionError, match="ended with status"):
        typed(tmp_path, f"{SETUP % ''}```{code}\n```\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Save this:\n\n<!-- file: x.py -->\n```python\nx = 1\n```\n\nIt is `x.py`.", "where to save"),
        ("Again:\n\n<!-- restart -->\n```console\n$ true\n```\n", "to stop"),
        ("<!-- given: x = 1 -->\n```python\nprint(x)\n```\n", "sees nothing"),
    ],
    ids=["file", "restart", "given"],
)
def test_what_the_reader_of_a_typed_page_is_not_told(tmp_path, text, told):
    with pytest.raises(AssertionError, match=told):
        typed(tmp_path, text)
