"""Fault injection: servers whose system calls fail, and what their clients see of it.

``make inject`` runs everything and writes the table of docs/reliability.md; test_injection.py runs a part of it.

strace: how a call is made to fail. calls: which calls, with which errors. programs: the servers, as a user starts them.
clients: conversations with them. phases: what is done while calls fail, and what is judged afterwards. report: the
table.
"""
