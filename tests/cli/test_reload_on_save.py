"""`gtcpserver serve --reload`: saves of the program, as an editor makes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtcpserver.cli import file_watch
from gtcpserver.cli.commands import run as run_command
from gtcpserver.cli.file_watch import Watched, saves
from kit.supervised import Master, Start, alive, children, masters, wait_until

ONE = 'import gevent\ndef handler(conn):\n    gevent.sleep(float(conn.recv_until(b"\\n")))\n    conn.sendall(b"one")\n'


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with masters(tmp_path, control=False) as start:
        yield start


@pytest.fixture(params=["watchfiles", "stat"])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if request.param == "watchfiles":
        pytest.importorskip("watchfiles")
        return dict(os.environ)
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "watchfiles.py").write_text("raise ImportError")
    path = os.pathsep.join(filter(None, (str(hidden), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def ask(master: Master, line: bytes = b"0\n") -> str:
    with master.connect() as client:
        client.sendall(line)
        return client.makefile("rb").read().decode()


def watcher_of(master: Master) -> int:
    worker = int(master.wait_for(r"worker 0 \(pid (\d+)\) is ready"))
    (pid,) = [pid for pid in children(master.pid) if pid != worker]
    return pid


@pytest.mark.slow
def test_a_save_reloads_a_broken_one_shows_its_traceback_and_the_next_mends_it(start, tmp_path, way) -> None:
    master = start("--reload", app=ONE, env=way)
    app, watcher = tmp_path / "app.py", watcher_of(master)
    assert ask(master) == "one"
    with master.connect() as busy:
        busy.sendall(b"0.3\n")
        # The same size, and within the same second: all that bytecode files know of their source.
        app.write_text(ONE.replace("one", "two"))
        master.wait_for("app.py changed")
        master.wait_for("reload 1 is done")
        assert ask(master) == "two"
        assert busy.makefile("rb").read() == b"one"
    app.write_text("import gevent\ngevent.no_such_name\n")
    master.wait_for(r"reload 2 failed, the old workers serve on")
    assert 'app.py", line 2, in <module>' in master.log()
    assert "has no attribute 'no_such_name'" in master.log()
    assert ask(master) == "two"
    (tmp_path / "app.new").write_text(ONE.replace("one", "three"))
    (tmp_path / "app.new").rename(app)  # as editors save
    master.wait_for("reload 2 is done")
    assert ask(master) == "three"
    assert master.stop() == 0
    assert not alive(watcher)
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.slow
def test_a_blocked_handler_does_not_keep_a_save_from_being_noticed(start, tmp_path) -> None:
    master = start("--reload", app="def handler(conn):\n    while True: pass\n")
    blocked = int(master.wait_for(r"worker 0 \(pid (\d+)\) is ready"))
    with master.connect():
        (tmp_path / "app.py").write_text(ONE)
        master.wait_for("worker 0 .* is ready", 2)
        # The blocked worker listens on the same socket, but accepts nothing any more.
        assert ask(master) == "one"
        os.kill(blocked, signal.SIGKILL)
        assert master.stop() == 0


@pytest.mark.slow
def test_the_watcher_ends_with_a_killed_master(start) -> None:
    master = start("--reload", app=ONE)
    watcher = watcher_of(master)
    os.kill(master.pid, signal.SIGKILL)
    wait_until(lambda: not alive(watcher))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True])
def test_several_workers_reload_only_if_the_command_line_says_so(start, tmp_path, asked) -> None:
    environment = os.environ | {"GTCPSERVER_RELOAD": "1", "GTCPSERVER_WORKERS": "2"}
    master = start(*(["--reload"] if asked else []), app=ONE, env=environment)
    assert ("--reload is for development: watching" in master.log()) is asked
    assert ("GTCPSERVER_RELOAD: ignored with several workers" in master.log()) is not asked
    assert len(children(master.pid)) == (3 if asked else 2)
    assert master.stop() == 0


@pytest.mark.slow
def test_files_and_folders_of_one_s_own_count_too(start, tmp_path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "app.toml").write_text("timeout = 5\n")
    paths = ("--reload-path", "pages", "--config", "app.toml")
    master = start("--reload", *paths, app=ONE)
    (tmp_path / "pages" / "a.html").write_text("new")
    master.wait_for("pages/a.html changed")
    master.wait_for("reload 1 is done")
    (tmp_path / "app.toml").write_text("timeout = 6\n")
    master.wait_for("app.toml changed")
    master.wait_for("reload 2 is done")
    assert master.stop() == 0


def test_a_save_while_the_master_starts_does_not_end_it(tmp_path) -> None:
    program = f"""
import os, signal, sys
from gtcpserver.cli.file_watch import Watched
from gtcpserver.cli.reload import reloading_on_saves
with reloading_on_saves(Watched([{str(tmp_path)!r}])):
    print("begun", flush=True)
    sys.stdin.readline()
    while signal.SIGHUP not in signal.sigpending():
        pass
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child is left", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        # Until the watcher has looked for the first time, a save is part of what it finds there.
        names = iter(range(1_000_000))
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        while process.poll() is None:
            (tmp_path / f"m{next(names)}.py").write_text("")
            time.sleep(0.1)
        assert process.stdout.read() == "no child is left\n"
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--reload", "--preload", "--workers", "1"), "--reload: cannot be used together with --preload"),
        (("--reload-path", "pages"), "--reload-path: needs --reload"),
        (("--reload", "--reload-path", "nowhere"), "--reload-path: there is no 'nowhere'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(capsys, arguments, told) -> None:
    assert run_command(["serve", "app:handler", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gtcpserver: {told}")


def test_which_files_count(tmp_path) -> None:
    for path in (
        *("app.py", "readme.txt", "package/deep/inner.py", ".git/hook.py", "__pycache__/app.py", "env/lib/x.py"),
        *("env/pyvenv.cfg", "pages/a.html", "pages/.a.swp", "lib/site-packages/y.py"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.py").symlink_to("nowhere")
    watched = Watched([str(tmp_path)], [str(tmp_path / "pages")], [str(tmp_path / "readme.txt"), "nowhere"])
    found = {os.path.relpath(path, tmp_path) for path in watched.in_folders()}
    assert found == {"app.py", "package/deep/inner.py", "pages/a.html"}
    assert [os.path.basename(path) for path in watched.named()] == ["readme.txt"]


def test_files_that_are_written_one_after_the_other_are_one_save(tmp_path, monkeypatch) -> None:
    (tmp_path / "removed.py").write_text("")
    (tmp_path / "modified.py").write_text("")
    steps = iter([lambda: (tmp_path / "added.py").write_text(""), lambda: (tmp_path / "removed.py").unlink()])
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if seconds >= file_watch.LOOK_SECONDS:
            (tmp_path / "modified.py").write_text(str(len(waits)))
        else:
            next(steps, lambda: None)()

    monkeypatch.setattr(file_watch, "_sleep", sleep)
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    paths = next(saves(Watched([str(tmp_path)])))
    assert [os.path.basename(path) for path in paths] == ["added.py", "modified.py", "removed.py"]


def test_a_tree_that_never_rests_is_reported_all_the_same(tmp_path, monkeypatch) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        (tmp_path / "app.py").write_text(str(clock))

    monkeypatch.setattr(file_watch, "_sleep", sleep)
    monkeypatch.setattr(file_watch, "monotonic", lambda: clock[0])
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    changes = saves(Watched([str(tmp_path)]))
    for number in (1, 2, 3):  # a pause is no work, after which to rest
        assert len(next(changes)) == 1
        assert clock[0] < number * (file_watch.LOOK_SECONDS + file_watch.LONGEST_SAVE + 1)
