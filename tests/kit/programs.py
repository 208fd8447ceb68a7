"""Programs that some tests use, and that a machine may lack."""

import shutil

import pytest


def needs(*programs):
    """Skip a test where one of them is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
