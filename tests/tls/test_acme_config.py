"""Options of certificates that are ordered, and a server whose first certificate has yet to come."""

import os
import ssl

import pytest

from gtcpserver import TLSConfig
from gtcpserver.errors import ConfigError
from gtcpserver.tls import Credentials
from gtcpserver.tls.acme.settings import DIRECTORIES, ACMESettings
from kit.tls import client_context, read

NAME = "a.example.com"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"names": "example.com"}, "names must be a list of host names"),
        ({"names": []}, "names must be a list of host names"),
        ({"names": [7]}, "names must be host names such as"),
        ({"names": ["a b.com"]}, "names must be host names such as"),
        ({"names": ["bücher.example"]}, 'write it as clients send it ("xn--...")'),
        ({"names": ["*.example.com"]}, "without a wildcard, which tls-alpn-01 cannot prove, got '*.example.com'"),
        ({"names": ["192.0.2.1"]}, "clients never ask for an IP address"),
        ({"names": ["localhost"]}, "names must be full host names"),
        ({"names": ["../../etc.d"]}, "names must be host names such as"),
        ({"names": ["a.example.com", "A.example.com."]}, "names must be different, got 'a.example.com' twice"),
        ({"names": [f"{n}.example.com" for n in range(101)]}, "names must be at most 100, got 101"),
        ({"email": "me"}, "email must be one address such as"),
        ({"email": "a@example.com,b@example.com"}, "email must be one address"),
        ({"email": "a@example.com?subject=x"}, "email must be one address"),
        ({"email": 7}, "email must be one address"),
        ({"directory": "letsencrypt"}, 'directory must be "staging", "production" or the https URL'),
        ({"directory": "http://example.com/dir"}, "directory must be"),
        ({"directory": "https://"}, "directory must be"),
        ({"directory": "https://me:pw@example.com/"}, "directory must be"),
        ({"directory": "https://example.com:99999/"}, "directory must be"),
        ({"directory": "https://example.com/a b"}, "directory must be"),
        ({"directory": None}, "directory must be"),
        ({"folder": ""}, "folder must be the path of a folder"),
        ({"folder": 7}, "folder must be the path of a folder"),
        ({"folder": "/dev/null/acme"}, '"/dev/null" is not a folder'),
        ({"folder": __file__}, "is not a folder"),
        ({"ca_file": "/does/not/exist"}, "ca_file must be a PEM file"),
        ({"certfile": "x"}, "certfile cannot be used together with acme"),
        ({"keyfile": "x"}, "keyfile cannot be used together with acme"),
        ({"watch": 0}, "watch must be a number"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, text):
    options = {"names": [NAME], "folder": tmp_path, **options}
    with pytest.raises(ConfigError) as caught:
        TLSConfig.acme(options.pop("names"), **options)
    assert text in str(caught.value)


def test_a_folder_of_somebody_else(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with pytest.raises(ConfigError, match=r'may not write to "/root|may not write to "/"'):
        TLSConfig.acme([NAME], folder="/root-only/acme")


def test_what_is_managed_is_made_by_acme_alone(shared):
    with pytest.raises(ConfigError, match=r"managed must be what TLSConfig\.acme makes, or None, got 7"):
        TLSConfig(*shared.server, managed=7)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "josepy" else object())
    with pytest.raises(ConfigError, match=r"acme needs the package josepy: pip install 'gtcpserver\[acme\]'"):
        TLSConfig.acme([NAME], folder=tmp_path)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"STATE_DIRECTORY": "{}/a:{}/b"}, "a/acme"),
        ({"XDG_STATE_HOME": "{}/state"}, "state/gtcpserver/acme"),
        ({"HOME": "{}"}, ".local/state/gtcpserver/acme"),
    ],
)
def test_the_usual_folder(monkeypatch, tmp_path, variables, folder):
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("{}", str(tmp_path)))
    assert TLSConfig.acme([NAME]).managed.folder == str(tmp_path / folder)
    assert not (tmp_path / folder).exists()


def test_settings_go_to_the_helper_and_back(tmp_path):
    settings = ACMESettings.checked([NAME, "b.example.com"], "me@example.com", "production", tmp_path, __file__)
    assert settings.directory == DIRECTORIES["production"]
    assert ACMESettings.from_json(settings.to_json()) == settings


@pytest.fixture
def config(tmp_path):
    return lambda **options: TLSConfig.acme([NAME], folder=tmp_path / "acme", **options)


def put(config, *files):
    os.makedirs(os.path.dirname(config.certfile), exist_ok=True)
    with open(config.certfile + ".new", "wb") as file:
        file.write(b"".join(read(path) for path in files))
    os.rename(config.certfile + ".new", config.certfile)


def shake_hands(credentials, name):
    """The certificate that a client gets; or its error."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = credentials.context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context().wrap_bio(to_client, to_server, server_hostname=name)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                if side is client:
                    return error.reason
    return client.getpeercert(True)


@pytest.mark.parametrize("name", [NAME, "c.example.com", None])
def test_handshakes_are_refused_until_there_is_a_certificate(config, shared, name):
    credentials = Credentials(config())
    assert credentials.expires_at is None
    assert shake_hands(credentials, name) == "TLSV1_ALERT_INTERNAL_ERROR"
    put(credentials.config, *shared.server)
    credentials.reload()
    assert credentials.expires_at is not None
    assert shake_hands(credentials, name) == ssl.PEM_cert_to_DER_cert(first(shared))
    # A certificate that is gone, or damaged, changes nothing.
    os.unlink(credentials.config.certfile)
    with pytest.raises(ConfigError, match="is gone"):
        credentials.reload()
    put(credentials.config, shared.server[0])
    with pytest.raises(ConfigError, match="must hold a private key"):
        credentials.reload()
    assert shake_hands(credentials, name) == ssl.PEM_cert_to_DER_cert(first(shared))


def first(files):
    pem = read(files.server[0]).decode()
    return pem[: pem.index("-----END CERTIFICATE-----")] + "-----END CERTIFICATE-----\n"


def test_other_certificates_are_served_from_the_beginning(config, shared):
    credentials = Credentials(config(sni={"b.example.com": shared.server}))
    assert credentials.expires_at is not None
    assert shake_hands(credentials, "b.example.com") == ssl.PEM_cert_to_DER_cert(first(shared))
    assert shake_hands(credentials, NAME) == "TLSV1_ALERT_INTERNAL_ERROR"


def test_strict_names_without_a_certificate(config):
    credentials = Credentials(config(strict_sni=True))
    assert shake_hands(credentials, NAME) == "TLSV1_UNRECOGNIZED_NAME"


def test_a_certificate_that_is_unusable_at_the_start_is_an_error(config, shared):
    put(config(), shared.server[0])
    with pytest.raises(ConfigError, match="must hold a private key"):
        config()
