"""run() in a program that is a script: a mistake ends it with one line, and is an exception to those who catch it."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

PROGRAM = """
{head}
from gtcpserver import run

def handle(conn):
    conn.sendall(b"x")

if __name__ == "__main__":
    {call}
"""


@pytest.fixture
def fail(tmp_path):
    """`fail(call, head="")` runs a program that ends by itself; its exit status and what it printed to stderr."""

    def fail(call: str, head: str = "") -> tuple[int, str]:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(head=head, call=call))
        command = [sys.executable, str(program)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    return fail


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ('run(handle, "127.0.0.1:99999")', "port must be 0 to 65535, got '127.0.0.1:99999'"),
        ('run(handle, "127.0.0.1:99999", workers=1)', "port must be 0 to 65535, got '127.0.0.1:99999'"),
        ('run("program:nothing", 0)', "'program:nothing': program has no 'nothing'"),
        ('run("program:nothing", 0, workers=1)', "'program:nothing': program has no 'nothing'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_status_2(fail, call, message):
    assert fail(call) == (2, f"gtcpserver: {message}\n")


def test_an_example_with_a_wrong_address_says_so_in_one_line():
    command = [sys.executable, str(EXAMPLES / "echo.py"), "127.0.0.1:99999"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("options", ["", ", workers=1"])
def test_an_address_in_use_is_one_line_and_exit_status_1(fail, options):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = fail(f'run(handle, "127.0.0.1:{port}"{options})')
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("gtcpserver: ")
    assert f"127.0.0.1:{port} is already in use" in said


@pytest.mark.parametrize("options", ["", ", workers=1"])
def test_a_program_can_catch_the_error(fail, options):
    call = f"""
    from gtcpserver import ConfigError
    try:
        run(handle, "127.0.0.1:99999"{options})
    except ConfigError as error:
        raise RuntimeError("mine") from error
    """
    status, said = fail(call.strip())
    assert status == 1
    assert "Traceback" in said
    assert said.endswith("RuntimeError: mine\n")


@pytest.mark.parametrize("options", ["", ", workers=1"])
def test_an_error_of_the_users_code_keeps_its_traceback(fail, tmp_path, options):
    (tmp_path / "app.py").write_text(
        "from gtcpserver import TLSConfig\ntls = TLSConfig('missing.pem', minimum_version=5)\n"
    )
    status, said = fail(f'run("app:handle", 0{options})')
    assert status in (1, 3)
    assert "Traceback" in said
    assert 'app.py", line 2' in said


def test_an_excepthook_of_the_programs_own_is_kept(fail):
    head = """
import sys
def hook(kind, error, where):
    print("hooked", kind.__name__, file=sys.stderr)
sys.excepthook = hook
"""
    assert fail('run(handle, "127.0.0.1:99999")', head) == (1, "hooked ConfigError\n")


def test_an_interactive_session_keeps_the_traceback():
    code = 'from gtcpserver import run\nrun(print, "127.0.0.1:99999")\nprint("still " + "here")\n'
    done = subprocess.run(
        [sys.executable, "-i", "-c", ""], input=code, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" in done.stderr
    assert "still here" in done.stdout
