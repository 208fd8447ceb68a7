"""An ACME authority on loopback: pebble, Let's Encrypt's own for tests, behind a front that can be in a bad mood."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import ssl
import subprocess
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trustme

from gtcpserver.tls.acme.folder import Folder, read_json, write_json
from gtcpserver.tls.acme.settings import ACMESettings
from kit.patience import SOON
from kit.ports import free_port
from kit.waiting import wait_for_port

DAYS_VALID = 90

#: (name of the environment variable, value): no random pauses, no random refusals, no reuse of proofs.
PEBBLE = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PEBBLE_AUTHZREUSE": "0"}


class Pebble:
    """pebble, and its name server, for which all names are this host's.

    Attributes:
        port: where it speaks HTTPS.
        validates: the port that it connects to for a challenge, instead of 443.
    """

    def __init__(self, folder):
        self.ca = trustme.CA()
        leaf = self.ca.issue_cert("127.0.0.1")
        self.ca_file = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.ca_file)
        leaf.private_key_pem.write_to_path(str(folder / "key.pem"))
        (folder / "cert.pem").write_bytes(b"".join(one.bytes() for one in leaf.cert_chain_pems))
        self.port, self.validates, names, management = (free_port() for _ in range(4))
        (folder / "pebble.json").write_text(
            json.dumps(
                {
                    "pebble": {
                        "listenAddress": f"127.0.0.1:{self.port}",
                        "managementListenAddress": f"127.0.0.1:{management}",
                        "certificate": "cert.pem",
                        "privateKey": "key.pem",
                        "httpPort": 1,
                        "tlsPort": self.validates,
                        "certificateValidityPeriod": DAYS_VALID * 86400,
                    }
                }
            )
        )
        self._log = (folder / "log").open("wb")
        no_others = ["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", ""]
        dns = ["-dns01", f"127.0.0.1:{names}", "-management", f"127.0.0.1:{free_port()}"]
        self._processes = [
            self._start(folder, "pebble-challtestsrv", *no_others, *dns),
            self._start(folder, "pebble", "-config", "pebble.json", "-dnsserver", f"127.0.0.1:{names}"),
        ]
        wait_for_port(names, self._processes[0])
        wait_for_port(self.port, self._processes[1])

    def _start(self, folder, *command):
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, **PEBBLE}, stdout=self._log, stderr=subprocess.STDOUT
        )

    def stop(self):
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()


class Front:
    """What the server takes for the authority: passes requests on to pebble, unless it is told otherwise.

    Attributes:
        directory: its URL.
        asked: (method, path) of each request. `sent`: (path, payload) of each signed one.
        tricks: path prefix -> function(request) that returns (status, headers, JSON object), or None to pass it on.
        window: what it answers to questions about renewals, an object of RFC 9773; None: it knows nothing of such.
        skew: seconds by which its clock is ahead.
        validates: the port that the authority connects to for a challenge.
    """

    def __init__(self, pebble):
        self.asked, self.sent, self.tricks = [], [], {}
        self.window, self.window_retry, self.skew = None, None, 0.0
        self.validates = pebble.validates
        front = self

        self._context = ssl.create_default_context(cafile=pebble.ca_file)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            upstream = None

            def log_message(self, *_arguments):
                pass

            def do_GET(self):
                front.serve(self, pebble)

            do_HEAD = do_POST = do_GET

            def finish(self):
                with contextlib.suppress(OSError):
                    super().finish()
                if self.upstream is not None:
                    self.upstream.close()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pebble.ca.issue_cert("127.0.0.1").configure_cert(context)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self.ca_file = pebble.ca_file
        self.directory = f"https://127.0.0.1:{self._server.server_address[1]}/dir"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, prefix):
        return sum(path.startswith(prefix) for _, path in self.asked)

    def serve(self, request, pebble):
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.asked.append((request.command, request.path))
        if body:
            with contextlib.suppress(ValueError):
                payload = json.loads(body)["payload"]
                self.sent.append((request.path, json.loads(base64.urlsafe_b64decode(payload + "==") or b"null")))
        for prefix, trick in list(self.tricks.items()):
            if request.path.startswith(prefix) and (answer := trick(request)) is not None:
                status, headers, data = answer
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.answer(request, status, headers, data, "application/problem+json")
                return
        if request.path.startswith("/renewal-info/"):
            headers = {} if self.window_retry is None else {"Retry-After": str(self.window_retry)}
            self.answer(request, 200, headers, json.dumps(self.window).encode(), "application/json")
            return
        self.pass_on(request, body, pebble)

    def pass_on(self, request, body, pebble):
        if request.upstream is None:
            request.upstream = http.client.HTTPSConnection(
                "127.0.0.1", pebble.port, timeout=SOON, context=self._context
            )
        headers = {"Host": request.headers["Host"]}
        if body:
            headers["Content-Type"] = request.headers["Content-Type"]
        request.upstream.request(request.command, request.path, body or None, headers)
        answer = request.upstream.getresponse()
        data = answer.read()
        if b"error:badNonce" in data:  # one time in a hundred, whatever it was told: the client asks again
            self.asked.remove((request.command, request.path))
        wanted = ("Location", "Link", "Replay-Nonce", "Retry-After")
        headers = {name: answer.headers[name] for name in wanted if name in answer.headers}
        if request.path == "/dir" and self.window is not None:
            data = json.loads(data)
            data["renewalInfo"] = self.directory.removesuffix("/dir") + "/renewal-info"
            data = json.dumps(data).encode()
        self.answer(request, answer.status, headers, data, answer.headers.get("Content-Type", "text/plain"))

    def answer(self, request, status, headers, data, kind):
        with contextlib.suppress(OSError):
            request.send_response_only(status)
            request.send_header("Date", formatdate(time.time() + self.skew, usegmt=True))
            for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
                request.send_header(name, value)
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(data)


def problem(kind, detail="on purpose", status=400, **headers):
    """An answer of the authority that refuses."""
    headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return status, headers, {"type": f"urn:ietf:params:acme:error:{kind}", "detail": detail, "status": status}


def once(answer):
    """A trick for one request."""
    left = [answer]
    return lambda _request: left.pop() if left else None


def settings_for(front, folder, *names, email=None):
    return ACMESettings.checked(names or ["a.example.com"], email, front.directory, str(folder), front.ca_file)


def change_state(settings, **changes):
    """Change what is remembered, to make the time pass."""
    folder = Folder(settings)
    write_json(folder.state, {**read_json(folder.state), **changes})


def state_of(settings):
    return read_json(Folder(settings).state)


#: Makes a look due.
DUE = {"next_look": 0.0, "not_before": 0.0, "issued": 0.0}
