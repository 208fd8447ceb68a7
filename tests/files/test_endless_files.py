"""A file that is too long for what it should be is an error that says so, and not the end of all memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gtcpserver import ConfigError
from gtcpserver.files import lent
from gtcpserver.files.toml_file import read_text
from gtcpserver.proxy.passwords import read_htpasswd
from kit.commands import run_command

TOO_LONG = f"it has more than {lent.LARGEST} bytes"


def test_an_endless_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=TOO_LONG):
        lent.read_file("/dev/zero")
    with pytest.raises(ConfigError, match=f"cannot read /dev/zero: {TOO_LONG}"):
        read_text("/dev/zero")
    with pytest.raises(ConfigError, match=f"cannot read /dev/zero: {TOO_LONG}"):
        read_htpasswd("/dev/zero")


def test_a_file_of_the_largest_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "LARGEST", 1000)
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1000)
    assert len(lent.read_file(str(path))) == 1000
    path.write_bytes(b"a" * 1001)
    with pytest.raises(OSError, match="more than 1000 bytes"):
        lent.read_file(str(path))


def test_a_lent_file_has_the_same_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        if isinstance(arguments[0], str):
            raise PermissionError(13, "Permission denied")
        return real(*arguments, **options)

    real = open
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(lent, "_lender", lambda path: os.open(path, os.O_RDONLY))
    with pytest.raises(OSError, match=TOO_LONG):
        lent.read_file("/dev/zero")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["echo", "--log-config", "/dev/zero"], "--log-config: cannot read /dev/zero: "),
        (["proxy", "check", "/dev/zero"], "cannot read /dev/zero: "),
        (["echo", "--tls-certfile", "/dev/zero"], '/dev/zero" cannot be read: it has more than'),
        (["proxy", "--htpasswd", "/dev/zero"], "--htpasswd: cannot read /dev/zero: "),
        (["echo", "--tls-password-file", "/dev/zero"], "--tls-password-file: cannot read"),
    ],
)
def test_a_command_names_the_endless_file(arguments: list[str], told: str) -> None:
    done = run_command(*arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert told in line


def test_an_endless_settings_file_ends_before_the_standard_library_is_patched(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gtcpserver", "serve", "app:handle", "--config", "/dev/zero"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (2, f"gtcpserver: cannot read /dev/zero: {TOO_LONG}\n")
