"""Certificates from a real ACME authority: orders, renewals, refusals, and what is left after each."""

import datetime
import os
import re
import socket
import ssl
import stat
import time
from urllib.parse import urlsplit

import pytest
from cryptography import x509

from gtcpserver import TLSConfig
from gtcpserver.tls.acme import authority, ordering
from gtcpserver.tls.acme.authority import AuthorityError
from gtcpserver.tls.acme.folder import Folder, read_json, write_json
from gtcpserver.tls.acme.helper import look, roll_over
from gtcpserver.tls.acme.ordering import LONGEST_ORDER
from gtcpserver.tls.acme.schedule import DAY, PAUSES
from kit.acme import DUE, change_state, once, problem, settings_for, state_of
from kit.patience import SOON
from kit.programs import needs

pytestmark = [needs("pebble", "pebble-challtestsrv"), pytest.mark.slow]


class Site:
    """A server that answers challenges, and looks that the test makes."""

    def __init__(self, front, folder, server, settings, in_thread):
        self.front, self.server, self.settings = front, server, settings
        self.folder = Folder(settings)
        self.lines = []
        self._in_thread = in_thread

    def look(self, **changes):
        """Look once, in a native thread; returns whether there is a new certificate."""
        if changes:
            change_state(self.settings, **changes)
        os.makedirs(self.settings.folder, 0o700, exist_ok=True)
        self.folder.prepare()
        return self._in_thread(lambda: look(self.settings, self.say, lambda _seconds: time.sleep(0.02)))

    def say(self, level, text):
        self.lines.append(f"{level} {text}")

    @property
    def certificate(self):
        with open(self.folder.certificate, "rb") as file:
            return x509.load_pem_x509_certificates(file.read())[0]

    def said(self, text):
        return [line for line in self.lines if text in line]


@pytest.fixture
def site(pebble, front, tmp_path, serve, in_thread, monkeypatch):
    # The test itself looks.
    monkeypatch.setattr("gtcpserver.server.certificates.keep_certificate", lambda *_arguments: None)

    def make(*names, **options):
        names = names or ("a.example.com",)
        tls = TLSConfig.acme(
            names, directory=front.directory, folder=tmp_path / "acme", ca_file=front.ca_file, watch=0.05, **options
        )
        server = serve(lambda conn: conn.sendall(b"hi"), f"127.0.0.1:{pebble.validates}", tls=tls)
        return Site(front, tmp_path, server, settings_for(front, tmp_path / "acme", *names), in_thread)

    return make


def served_by(site, in_thread, name):
    def ask():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", site.server.port), SOON) as sock,
            context.wrap_socket(sock, server_hostname=name) as client,
        ):
            assert client.recv(2) == b"hi"
            return client.getpeercert(binary_form=True)

    return x509.load_der_x509_certificate(in_thread(ask))


def test_a_certificate_is_issued_and_served(site, front, in_thread):
    here = site("a.example.com", "b.example.com")
    assert here.look()
    here.server.reload_tls()
    found = served_by(here, in_thread, "b.example.com")
    assert found == here.certificate
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example.com", "b.example.com"]
    # A proof each, from the server's own port; the handler was never called for one.
    assert here.server.stats().handshake_failures["acme_challenge"] >= 2
    # Nothing is left of the order, and nobody else can read the rest.
    left = {
        name: stat.S_IMODE(os.stat(os.path.join(where, name)).st_mode)
        for where, _, names in os.walk(here.settings.folder)
        for name in names
    }
    assert left == dict.fromkeys(("account.json", "certificate.pem", "state.json"), 0o600)
    assert here.said("info certificate for a.example.com, b.example.com issued")
    # Two thirds of the lifetime later, and a little more.
    lifetime = 90 * DAY
    after = state_of(here.settings)["renew_at"] - found.not_valid_before_utc.timestamp()
    assert lifetime * 2 / 3 <= after <= lifetime * 0.71
    # Nothing to do: nobody is asked.
    front.asked.clear()
    assert not here.look()
    assert front.asked == []
    # The daily question.
    assert not here.look(next_look=0.0)
    assert front.count("/order-plz") == 0
    assert front.count("/dir") == 1


def test_all_options_of_tls_leave_challenges_alone(site, pebble, in_thread):
    here = site(client_auth="required", client_ca=pebble.ca_file, strict_sni=True, minimum_version="TLSv1.3",
                alpn=["h2"], session_tickets=0)  # fmt: skip
    assert here.look()
    # A protocol and a client certificate that the authority does not have.
    assert here.server.stats().handshake_failures["acme_challenge"]


def test_a_renewal_replaces_the_certificate(site, front):
    here = site()
    assert here.look()
    first = here.certificate
    account = read_json(here.folder.account)
    assert here.look(**DUE, renew_at=1.0)
    assert here.certificate.serial_number != first.serial_number
    assert read_json(here.folder.account) == account
    assert front.count("/sign-me-up") == 1
    # The key is another one, too.
    assert here.certificate.public_key() != first.public_key()


def test_a_certificate_for_other_names_is_replaced_and_stays_until_then(site, front, in_thread):
    here = site()
    assert here.look()
    first = here.certificate
    more = settings_for(front, here.settings.folder, "a.example.com", "c.example.com")
    here.settings = more
    change_state(more, written=time.time() - 61)
    assert not here.look()  # this server does not answer for c.example.com
    assert here.said("certificate for a.example.com, c.example.com not renewed")
    assert here.certificate == first


def test_a_challenge_that_fails_leaves_the_old_certificate(site, front):
    here = site()
    assert here.look()
    first = here.certificate
    here.server.tls.answers = None  # as on a host whose port 443 is another program's
    os.unlink(here.folder.account)  # pebble may take the proof of an account's earlier order, one time in a hundred
    before = time.time()
    assert not here.look(**DUE, renew_at=1.0)
    assert here.certificate == first
    state = state_of(here.settings)
    assert state["failures"] == 1
    assert before + PAUSES[0] <= state["next_look"] <= time.time() + PAUSES[0] * 1.25
    [line] = here.said("not renewed")
    assert line.startswith("warning certificate for a.example.com not renewed; it expires on 20")
    assert "a.example.com was not proved: unauthorized: " in line
    assert not os.path.exists(here.folder.order)
    assert not os.path.exists(here.folder.challenge("a.example.com"))
    # Not again before the pause is over; and then a longer one.
    orders = front.count("/order-plz")
    assert not here.look()
    assert front.count("/order-plz") == orders
    assert not here.look(next_look=0.0)
    assert state_of(here.settings)["failures"] == 2
    assert state_of(here.settings)["next_look"] >= before + PAUSES[1]


@pytest.mark.parametrize(
    ("path", "answer", "pause", "text"),
    [
        ("/order-plz", problem("rateLimited", "too many", 429, Retry_After=86400), 86400, "rateLimited: too many"),
        ("/order-plz", (503, {"Retry-After": "7200"}, "sorry"), 7200, "HTTP status 503"),
        ("/order-plz", (502, {"Retry-After": "soon"}, b"<html>"), PAUSES[0], "HTTP status 502"),
        ("/order-plz", (200, {}, []), PAUSES[0], ""),
        ("/dir", (404, {}, {}), PAUSES[0], ""),
        ("/dir", (200, {}, {"no": "directory"}), PAUSES[0], "is no ACME directory: it has no newNonce"),
        ("/sign-me-up", problem("externalAccountRequired"), PAUSES[0], "externalAccountRequired: on purpose"),
        ("/finalize-order", problem("badCSR", "evil\n\x1b[31m\nlines"), PAUSES[0], "badCSR: evil  [31m lines"),
        (
            "/certZ/",
            (200, {"Replay-Nonce": "dG9vIG9sZA"}, "no certificate"),
            PAUSES[0],
            "the certificate cannot be read",
        ),
    ],
)
def test_an_error_of_the_authority_is_told_and_waited_for(site, front, path, answer, pause, text):
    here = site()
    front.tricks[path] = once(answer)
    before = time.time()
    assert not here.look()
    [line] = here.said("warning no certificate for a.example.com (attempt 1)")
    assert text in line
    state = state_of(here.settings)
    assert before + pause <= state["next_look"] <= time.time() + max(pause, PAUSES[0] * 1.25)
    # A restart, or other names, do not shorten what the authority has asked for.
    if pause > PAUSES[0]:
        assert not here.look(names=["b.example.com"], written=before - 1000)
        assert len(here.said("attempt")) == 1
    # And then all is well.
    assert here.look(names=["a.example.com"], **DUE)
    assert state_of(here.settings)["failures"] == 0


def test_a_nonce_that_is_too_old_is_replaced(site, front):
    here = site()
    answers = [problem("badNonce", Replay_Nonce="dG9vIG9sZA") for _ in range(3)]
    front.tricks["/order-plz"] = lambda _request: answers.pop() if answers else None
    assert here.look()
    assert not answers


def test_an_authority_that_cannot_be_reached(site, front):
    here = site()
    front.stop()
    assert not here.look()
    assert here.said("warning no certificate for a.example.com (attempt 1)")


def test_an_account_that_the_authority_has_forgotten_is_made_again(site, front):
    here = site()
    assert here.look()
    front.tricks["/order-plz"] = once(problem("accountDoesNotExist"))
    key = read_json(here.folder.account)["key"]
    assert here.look(**DUE, renew_at=1.0)
    assert front.count("/sign-me-up") == 2
    assert read_json(here.folder.account)["key"] == key


def test_an_order_goes_on_where_it_was_cut(site, front):
    here = site()
    front.tricks["/finalize-order"] = once((503, {}, "sorry"))
    assert not here.look()
    kept = read_json(here.folder.order)
    assert stat.S_IMODE(os.stat(here.folder.order).st_mode) == 0o600
    assert here.look(**DUE)
    assert here.said(f"going on with the order {kept['uri']}, which is ready")
    assert front.count("/order-plz") == 1
    # The certificate is for the key that was kept.
    with open(here.folder.certificate) as file:
        assert kept["key"] in file.read()


@pytest.mark.parametrize("damage", ["uri", "key", "text"])
def test_an_order_that_cannot_go_on_begins_anew(site, front, damage):
    here = site()
    front.tricks["/finalize-order"] = once((503, {}, "sorry"))
    assert not here.look()
    kept = read_json(here.folder.order)
    if damage == "text":
        with open(here.folder.order, "w") as file:
            file.write("{")
    else:
        other = {"uri": kept["uri"] + "x", "key": "none"}[damage]
        write_json(here.folder.order, {**kept, damage: other})
    assert here.look(**DUE)
    assert front.count("/order-plz") == 2


@pytest.mark.parametrize("out_of_reach", ["order", "certificate"])
def test_an_order_that_is_out_of_reach_for_hours_is_given_up(site, front, out_of_reach):
    here = site()
    front.tricks["/finalize-order" if out_of_reach == "order" else "/certZ/"] = once((503, {}, "sorry"))
    assert not here.look()
    path = urlsplit(read_json(here.folder.order)["uri"]).path if out_of_reach == "order" else "/certZ/"
    front.tricks[path] = lambda _request: (503, {}, "sorry")
    assert not here.look(**DUE)
    assert front.count("/order-plz") == 1  # the authority may come back
    long_ago = time.time() - LONGEST_ORDER
    os.utime(here.folder.order, (long_ago, long_ago))
    if out_of_reach == "certificate":
        assert not here.look(**DUE)
        assert front.count("/order-plz") == 1
        del front.tricks[path]
    assert here.look(**DUE)
    assert front.count("/order-plz") == 2


def test_another_key_for_the_account(site, front):
    here = site()
    assert here.look()
    old = read_json(here.folder.account)
    roll_over(here.settings, here.say)
    new = read_json(here.folder.account)
    assert new["uri"] == old["uri"]
    assert new["key"] != old["key"]
    assert "next_key" not in new
    assert here.look(**DUE, renew_at=1.0)
    # The old one is worthless.
    write_json(here.folder.account, old)
    assert not here.look(**DUE, renew_at=1.0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_change_of_keys_that_was_cut_short_is_finished(site, front, when, monkeypatch):
    here = site()
    assert here.look()
    old = read_json(here.folder.account)
    if when == "before":
        front.tricks["/rollover"] = once((503, {}, "sorry"))
        with pytest.raises(AuthorityError):
            roll_over(here.settings, here.say)
        assert read_json(here.folder.account)["next_key"] != old["key"]
    else:

        def fail_at_the_second(path, data):
            if "next_key" not in data:
                raise OSError("no space")
            write_json(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(authority, "write_json", fail_at_the_second)
            with pytest.raises(OSError, match="no space"):
                roll_over(here.settings, here.say)
    kept = read_json(here.folder.account)
    assert kept["key"] == old["key"]
    assert here.look(**DUE, renew_at=1.0)
    now = read_json(here.folder.account)
    assert now["key"] == (old["key"] if when == "before" else kept["next_key"])
    assert "next_key" not in now


def test_another_address_is_told_to_the_authority(site, front, in_thread):
    here = site()
    assert here.look()
    here.settings = settings_for(front, here.settings.folder, email="me@example.com")
    assert here.look(**DUE, renew_at=1.0)
    assert {"contact": ["mailto:me@example.com"]} in [payload for _, payload in front.sent]
    assert read_json(here.folder.account)["email"] == "me@example.com"


def window(start, end, **more):
    moments = [
        datetime.datetime.fromtimestamp(time.time() + days * DAY, datetime.timezone.utc) for days in (start, end)
    ]
    start, end = (moment.isoformat().replace("+00:00", "Z") for moment in moments)
    return {"suggestedWindow": {"start": start, "end": end}, **more}


def test_the_authority_may_want_an_earlier_renewal(site, front):
    here = site()
    front.window, front.window_retry = window(50, 52), 3 * 3600
    assert here.look()
    state = state_of(here.settings)
    assert 50 * DAY - 5 < state["renew_at"] - time.time() < 52 * DAY + 5
    assert 2.9 * 3600 < state["next_look"] - time.time() < 3.1 * 3600
    # The same window: the same time.
    assert not here.look(next_look=0.0)
    assert state_of(here.settings)["renew_at"] == state["renew_at"]
    first = here.certificate
    # A mass revocation: the window is in the past. Within the hour after the last one nothing is ordered.
    front.window = window(-2, -1, explanationURL="https://authority.example/why")
    assert not here.look(next_look=0.0)
    assert here.said("https://authority.example/why")
    assert here.look(**DUE)
    assert here.certificate != first
    # RFC 9773 section 5: the new order names the certificate that it replaces.
    orders = [payload for path, payload in front.sent if path == "/order-plz"]
    asked = next(path for _, path in front.asked if path.startswith("/renewal-info/"))
    assert "replaces" not in orders[0]
    assert orders[1]["replaces"] == asked.removeprefix("/renewal-info/")


@pytest.mark.parametrize(
    "answer",
    [
        (500, {}, "sorry"),
        (200, {}, {}),
        (200, {}, window(52, 50)),
    ],
    ids=["refused", "empty", "reversed"],
)
def test_a_useless_suggestion_leaves_two_thirds(site, front, answer):
    here = site()
    front.window = {}
    front.tricks["/renewal-info"] = lambda _request: answer
    assert here.look()
    assert here.said("info the authority does not say when to renew")
    assert 59 * DAY < state_of(here.settings)["renew_at"] - time.time() < 64 * DAY


def test_a_certificate_that_was_replaced_already_is_ordered_without_saying_so(site, front):
    here = site()
    front.window = window(50, 52)
    assert here.look()
    front.window = window(-2, -1)
    front.tricks["/order-plz"] = once(problem("alreadyReplaced", status=409))
    assert here.look(**DUE)
    orders = [payload for path, payload in front.sent if path == "/order-plz"]
    assert ["replaces" in order for order in orders] == [False, True, False]


def test_a_wrong_clock_is_told_and_renews_by_the_authoritys(site, front):
    here = site()
    assert here.look()
    front.skew = 10 * DAY
    # Ten days from now by its clock; by ours there is time.
    assert here.look(**DUE, renew_at=time.time() + 9 * DAY)
    [line] = here.said("warning the clock of this host is ")
    assert re.search(r" is (864000|863999) s behind that of the authority", line)


def test_a_clock_that_makes_each_certificate_expired_orders_no_flood(site, front):
    here = site()
    front.skew = 100 * DAY
    assert not here.look()
    assert here.said("the certificate has expired on")
    assert not os.path.exists(here.folder.certificate)
    assert state_of(here.settings)["failures"] == 1
    # A clock of ours that was set back has all times in the state in the future.
    front.skew = 0.0
    assert here.look(written=time.time() + 1000, next_look=time.time() + 1000)


def test_a_full_disk_leaves_the_old_certificate(site, monkeypatch):
    here = site()
    assert here.look()
    first = here.certificate

    def full(path, content):
        if path.endswith("certificate.pem"):
            raise OSError(28, "No space left on device")
        written(path, content)

    written = ordering.write_file
    monkeypatch.setattr(ordering, "write_file", full)
    assert not here.look(**DUE, renew_at=1.0)
    assert here.said("No space left on device")
    assert here.certificate == first
    # The order is kept: its certificate is fetched when there is space. Each new one would count at the authority.
    long_ago = time.time() - LONGEST_ORDER
    os.utime(here.folder.order, (long_ago, long_ago))
    assert not here.look(**DUE, renew_at=1.0)
    monkeypatch.undo()
    assert here.look(**DUE, renew_at=1.0)
    assert here.said("going on with the order")
    assert here.said("which is valid")
