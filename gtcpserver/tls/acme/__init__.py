"""Certificates that a server orders and renews by itself: ACME (RFC 8555), with the challenge tls-alpn-01 (RFC 8737).

    worker ──looks every 10 s──▶ state.json: is something to do?
       │ yes, and it gets the lock
       └──starts──▶ helper process ──HTTPS──▶ the authority, which connects to port 443 of each name:
                       │                      any worker answers, with the challenge's certificate in the folder
                       └─▶ certificate.pem, which all workers watch

The helper is a process of its own, which ends when its work is done: it waits in plain sockets, spends half a second of
CPU on imports, and parses what a stranger sends. The lock is held by the helper's copy of its descriptor, so it is free
as soon as the helper has ended, however that came about. All that must survive is in the folder, and each file is
replaced in one step.
"""

from .answers import Answers
from .folder import certificate_of
from .keeper import keep_certificate
from .settings import ACMESettings

__all__ = ["ACMESettings", "Answers", "certificate_of", "keep_certificate"]
