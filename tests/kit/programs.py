"""What some tests need, and a machine may lack."""

import shutil
import socket
import subprocess
import sys

import pytest

from kit.patience import SOON


def needs(*programs):
    """Skip a test where one of them is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this system has no IPv6 loopback address")


def run_in_network(source):
    """Run a Python program in a network of its own, with veth; it must succeed."""
    can = subprocess.run(["unshare", "--net", "ip", "link", "add", "type", "veth"], capture_output=True, text=True)
    if can.returncode != 0:
        pytest.skip(f"no network namespaces with veth: {can.stderr}")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", source], capture_output=True, text=True, timeout=SOON
    )
    assert done.returncode == 0, done.stderr
    return done
