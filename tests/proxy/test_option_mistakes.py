"""Mistakes in the options of gtcpserver proxy name the option; an empty value is a mistake, not an absent option."""

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


@pytest.mark.parametrize("arguments", [["--env-file="], ["--env-file", ""]])
def test_an_empty_name_of_an_environment_file(arguments):
    done = run_command("echo", *arguments)
    assert (done.returncode, done.stderr) == (2, "gtcpserver: --env-file: must name a file, got ''\n")
