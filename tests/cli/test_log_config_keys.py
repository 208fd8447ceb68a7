"""A mistake in the file of --log-config names the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.commands import run_command


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"handlers": 3}, "handlers must be a table, got 3"),
        ({"handlers": {"a": []}}, "handlers.a must be a table, got []"),
        ({"formatters": []}, "formatters must be a table, got []"),
        ({"formatters": {"a": "x"}}, "formatters.a must be a table, got 'x'"),
        ({"filters": None}, "filters must be a table, got None"),
        ({"loggers": {"gtcpserver": 5}}, "loggers.gtcpserver must be a table, got 5"),
        ({"root": "INFO"}, "root must be a table, got 'INFO'"),
        ({"root": {"level": "LOUD"}}, "Unable to configure root logger: Unknown level: 'LOUD'"),
        ({"root": {"handlers": 5}}, "Unable to configure root logger: "),
        ({"loggers": {"x": {"handlers": 1}}}, "Unable to configure logger 'x': "),
        ({"version": 2}, "Unsupported version: 2"),
        ({"version": []}, "Unsupported version: []"),
        ({"handlers": {"a": {"class": 5}}}, "Unable to configure handler 'a'"),
    ],
)
def test_the_key_is_named(tmp_path: Path, config: object, told: str) -> None:
    (tmp_path / "log.json").write_text(json.dumps(config))
    done = run_command("echo", "-b", "127.0.0.1:0", "--log-config", "log.json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"gtcpserver: --log-config: log.json: {told}")
    assert len(done.stderr.splitlines()) == 1
