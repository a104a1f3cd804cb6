"""`surefoot verify`: what `python -m surefoot.check` does."""

from __future__ import annotations

from surefoot.check import __main__ as checker


def main(argv: list[str]) -> int:
    """Run `surefoot verify` and return its exit code."""
    return checker.main(argv, prog="surefoot verify")
