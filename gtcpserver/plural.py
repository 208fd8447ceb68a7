"""counted: a number and its noun, as messages and log lines have them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 connection", "2 connections"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
