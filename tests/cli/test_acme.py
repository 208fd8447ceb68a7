"""Certificates that are ordered by themselves, from the command line: options, two masters, another key."""

import os
import re
import socket
import ssl

import pytest

from gtcpserver.tls.acme.folder import Folder, read_json
from kit.acme import settings_for, state_of
from kit.commands import run_command
from kit.patience import SOON
from kit.programs import needs
from kit.supervised import masters, wait_until

NAME = "a.example.com"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--acme", "*.example.com"], "--acme: must be without a wildcard"),
        (["--acme", NAME, "--acme", NAME], "--acme: must be different"),
        (["--acme-email", "me@example.com"], "--acme-email: needs --acme"),
        (["--acme", NAME, "--acme-email", "me"], "--acme-email: must be one address"),
        (["--acme", NAME, "--acme-directory", "http://x/"], '--acme-directory: must be "staging", "production" or'),
        (["--acme", NAME, "--acme-folder", "/dev/null/x"], '--acme-folder: "/dev/null/x" cannot be used'),
        (["--acme", NAME, "--acme-ca-file", "/none"], "--acme-ca-file: must be a PEM file"),
        (["--acme", NAME, "--tls-cert", "x"], "--acme: cannot be used together with --tls-certfile"),
        (["--acme", NAME, "--tls-key", "x"], "--acme: cannot be used together with --tls-keyfile"),
        (["--acme", NAME, "--tls-self-signed"], "--tls-self-signed: cannot be used together with --acme"),
        (["--acme", NAME, "--tls-watch", "none"], "--tls-watch: must be a number"),
        (["--acme", NAME, "--tls-max-handshakes", "0"], "--tls-max-handshakes: must be a whole number from 1"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, message):
    done = run_command("echo", *options, env={**os.environ, "XDG_STATE_HOME": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"gtcpserver: {message}")


def test_a_mistake_in_a_file_is_named(tmp_path):
    file = tmp_path / "app.toml"
    file.write_text('handler = "app:handle"\n[tls]\nacme = ["localhost"]\nacme_email = "me"\nacme_folder = "acme"\n')
    done = run_command("config", "check", str(file), cwd=tmp_path)
    assert done.returncode == 2
    assert f"{file} line 3: tls.acme: must be full host names" in done.stderr
    file.write_text(file.read_text().replace("localhost", NAME))
    done = run_command("config", "check", str(file), cwd=tmp_path)
    assert f"{file} line 4: tls.acme_email: must be one address" in done.stderr
    file.write_text(f'handler = "app:handle"\n[tls]\nacme = "{NAME}"\nacme_folder = "acme"\nalpn = "h2"\n')
    done = run_command("config", "check", str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "acme").exists()


def test_the_settings_in_effect_show_how_often_files_are_checked(tmp_path):
    for given, seconds in (((), "10.0"), (("--tls-watch", "3"), "3.0")):
        done = run_command("config", "show", "--acme", NAME, *given, cwd=tmp_path)
        assert re.search(rf"^tls\.watch +{seconds} ", done.stdout, re.MULTILINE), done.stdout


def test_another_key_needs_a_name(tmp_path):
    done = run_command("acme", "new-key", cwd=tmp_path)
    assert done.returncode == 2
    assert "--acme: is missing" in done.stderr


def served_by(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", port), SOON) as sock,
            context.wrap_socket(sock, server_hostname=NAME) as client,
        ):
            return client.getpeercert(True)
    except ssl.SSLError:
        return None


def without_lock(done):
    """A command that did not meet an order under way; None for one that did."""
    return None if "an order is under way" in done.stderr else done


@pytest.mark.slow
@needs("pebble", "pebble-challtestsrv")
def test_all_workers_of_two_masters_share_one_certificate(front, tmp_path):
    options = ["--acme", NAME, "--acme-directory", front.directory, "--acme-folder", str(tmp_path / "acme")]
    options += ["--acme-ca-file", front.ca_file, "--tls-watch", "0.1", "--workers"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with masters(tmp_path / "one") as start, masters(tmp_path / "two") as start_another:
        master = start(*options, "2", bind=f"127.0.0.1:{front.validates}")
        another = start_another(*options, "1")
        # Both workers of the first; those of the other may have found it at their start.
        wait_until(lambda: master.log().count("TLS certificates reloaded; the first expires on 20") >= 2)
        wait_until(lambda: served_by(another.port) == served_by(master.port) is not None)
        assert front.count("/order-plz") == 1
        line = re.compile(rf"INFO gtcpserver\.tls\[\d+\]: ACME: certificate for {NAME} issued; ")
        wait_until(lambda: len(line.findall(master.log() + another.log())) == 1)
        # Another key, while they run.
        settings = settings_for(front, tmp_path / "acme")
        path = Folder(settings).account
        key = read_json(path)["key"]
        wait_until(lambda: state_of(settings))  # the helper is about to end
        done = wait_until(lambda: without_lock(run_command("acme", "new-key", *options[:8])))
        assert "ACME: the account has a new key" in done.stderr
        assert read_json(path)["key"] != key
        assert master.stop() == 0
        assert another.stop() == 0
