"""Python imports it before all else where this folder is in PYTHONPATH: there, only what macOS has is left."""

from __future__ import annotations

from linux_alone import take_away

take_away()
