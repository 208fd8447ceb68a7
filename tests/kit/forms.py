"""The two forms in which the package runs: compiled, and pure Python."""

import pytest

import gtcpserver

#: For tests that put something in the place of a method or function that compiled code calls in C. The pure form, which
#: is the same source, is what they test.
pure_only = pytest.mark.skipif(gtcpserver.compiled, reason="compiled methods cannot be replaced; `make test-pure`")
