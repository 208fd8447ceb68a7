"""Become another user, and die with the parent process."""

from __future__ import annotations

import codecs
import logging
import os
import pwd

import gevent

from gtcpserver.linux import become_user
from gtcpserver.linux import die_with_parent as set_death_signal

from .config import SupervisorConfig

log = logging.getLogger("gtcpserver")


def become(config: SupervisorConfig) -> None:
    """Take the configured user and group, with the user's other groups, and the umask. Irreversible."""
    if config.umask is not None:
        os.umask(config.umask)
    if config.user is None and config.group is None:
        return
    _load_what_names_need()
    uid, gid, name = config.identity()
    if os.geteuid() == 0:
        if config.user is not None and name is not None:
            os.initgroups(name, gid)
        elif config.user is not None:
            os.setgroups([gid])
        become_user(uid, gid)
    if name is not None:
        # Programs look for their files there; this user cannot read root's.
        entry = pwd.getpwnam(name)
        os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)


def _load_what_names_need() -> None:
    """Load what gevent and Python's socket functions load at the first name that is looked up.

    Where the new user cannot read the installation, each client that asks for a name would get an error.
    """
    codecs.lookup("idna")
    _ = gevent.config.resolver


def die_with_parent(number: int) -> None:
    """Have the kernel send this signal when the parent process is gone (PR_SET_PDEATHSIG, prctl(2)).

    If a filter of seccomp(2) refuses that, only the end of the channel shows that the parent is gone: at once if the
    event loop runs, and never if the loop is blocked for good.
    """
    why = set_death_signal(number)
    if why is not None:
        log.debug("prctl(PR_SET_PDEATHSIG): %s", why)
