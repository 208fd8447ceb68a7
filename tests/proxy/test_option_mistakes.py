"""Mistakes in the options of gtcpserver proxy name the option; an empty value is a mistake, not an absent option."""

import os

import pytest

from kit.commands import run_command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--htpasswd", "missing"], "--htpasswd: cannot read missing: No such file or directory"),
        (["--htpasswd", "bad"], "--htpasswd: bad line 1 must be name:hash"),
        (["--htpasswd", ""], "--htpasswd: must name a file"),
        (["--upstream", ""], "--upstream: must be socks5://[user:password@]host:port or "),
        (["--upstream", "ftp://x"], "--upstream: must be socks5://[user:password@]host:port or "),
        (["--upstream-file", "url"], "--upstream-file: must be socks5://[user:password@]host:port or "),
        (["--external", ""], "--external: must be an address, or one of each family, or "),
        (["--external", "x"], "--external: must be an address, or one of each family, or "),
        (["--mixed", ""], "--mixed: "),
        (["--http", "x:y"], "--http: "),
        (["--user", ""], "--user: must be NAME:PASSWORD, got ''"),
        (["--allow-client", ""], "--allow-client: "),
        (["--allow-client", "10.0.0.0/99"], "--allow-client: "),
        (["--allow-destination", ""], "--allow-destination: "),
        (["--deny-destination", "a..b"], "--deny-destination: "),
        (["--config", "x", "--upstream", ""], "--upstream: cannot be used together with --config"),
        (["--upstream", "", "--upstream-file", "url"], "--upstream-file: cannot be used together with --upstream"),
        (["--config", ""], "cannot read : No such file or directory"),
        (["--print-config", "--upstream", ""], "--upstream: must be "),
        (["--log-config", ""], "--log-config: cannot read : No such file or directory"),
    ],
)
def test_a_mistake_names_its_option(tmp_path, arguments, told):
    (tmp_path / "bad").write_text("ada\n")
    (tmp_path / "url").write_text("http://\n")
    (tmp_path / "url").chmod(0o600)
    done = run_command("proxy", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.removeprefix("gtcpserver: ").startswith(told)


@pytest.mark.parametrize(
    ("variable", "value", "arguments", "told"),
    [
        ("HTPASSWD", "missing", [], "cannot read missing: No such file or directory"),
        ("UPSTREAM", "ftp://x", [], "must be socks5://[user:password@]host:port or "),
        ("UPSTREAM_FILE", "url", [], "must be socks5://[user:password@]host:port or "),
        ("USER_FILE", "missing", [], "cannot use 'missing'"),
        ("EXTERNAL", "x", [], "must be an address, or one of each family, or "),
        ("MIXED", "127.0.0.1:0 x:y", [], "port must be a number from 0 to 65535, got 'y' in 'x:y'"),
        ("SOCKS", "x:y", [], "port must be a number from 0 to 65535, got 'y' in 'x:y'"),
        ("HTTP", "x:y", [], "port must be a number from 0 to 65535, got 'y' in 'x:y'"),
        ("INTERCEPT", "x:y", [], "port must be a number from 0 to 65535, got 'y' in 'x:y'"),
        ("PROXY_USER", "ada", [], "must be NAME:PASSWORD, got 'ada'"),
        ("ALLOW_CLIENT", "10.0.0.0/99", [], ""),
        ("ALLOW_DESTINATION", "a..b", [], ""),
        ("DENY_DESTINATION", "a..b", [], ""),
        ("ALLOW_COMMAND", "fetch", [], "'fetch' is not one of 'connect', "),
        ("ALLOW_OPEN", "perhaps", [], "'perhaps' is not a valid boolean"),
        ("UDP_ADVERTISE", "x", [], "must be an address that clients reach"),
        ("UDP_PORTS", "1", [], "must be a range of ports such as \"50000-50999\", got '1'"),
        ("UDP_FULL_CONE", "perhaps", [], "'perhaps' is not a valid boolean"),
        ("REDACT", "perhaps", [], "'perhaps' is not a valid boolean"),
        ("ACCESS_LOG", "xml", [], "'xml' is not one of 'text', 'json'"),
        ("SOCKS", "127.0.0.1:0", ["--config", "x"], "cannot be used together with --config"),
        ("UPSTREAM_FILE", "url", ["--upstream", "http://h:1"], "cannot be used together with --upstream"),
    ],
)
def test_a_mistake_in_the_environment_names_its_variable(tmp_path, variable, value, arguments, told):
    (tmp_path / "url").write_text("http://\n")
    (tmp_path / "url").chmod(0o600)
    done = run_command("proxy", *arguments, cwd=tmp_path, env={**os.environ, f"GTCPSERVER_{variable}": value})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gtcpserver: GTCPSERVER_{variable}: {told}")
    assert told or value in line


def test_options_and_a_file_or_a_secret_that_the_environment_names():
    environment = {**os.environ, "GTCPSERVER_CONFIG": "x", "GTCPSERVER_UPSTREAM": "http://h:1"}
    done = run_command("proxy", "--mixed", "127.0.0.1:0", env=environment)
    assert done.returncode == 2
    assert done.stderr == "gtcpserver: --mixed: cannot be used together with GTCPSERVER_CONFIG\n"
    del environment["GTCPSERVER_CONFIG"]
    done = run_command("proxy", "--upstream-file", "x", env=environment)
    assert done.returncode == 2
    assert done.stderr == "gtcpserver: --upstream-file: cannot be used together with GTCPSERVER_UPSTREAM\n"


@pytest.mark.parametrize("arguments", [["--env-file="], ["--env-file", ""]])
def test_an_empty_name_of_an_environment_file(arguments):
    done = run_command("echo", *arguments)
    assert (done.returncode, done.stderr) == (2, "gtcpserver: --env-file: must name a file, got ''\n")
