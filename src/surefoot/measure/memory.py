"""How much memory there is, asked before a large matrix is made."""

from __future__ import annotations

import os
from pathlib import Path

from surefoot.errors import InputError


def available() -> int | None:
    """Return the bytes of memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        there = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
        return min(there, _left_to_the_container(there))
    except (OSError, StopIteration):  # not Linux
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def fits(needed: int) -> bool:
    """Whether so many bytes are available, as far as the system says."""
    there = available()
    return there is None or needed <= there


def _left_to_the_container(there: int) -> int:
    """Return what a container's own limit leaves, `there` if it has none."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or not used.exists() or not (most := limit.read_text(encoding="ascii").strip()).isdigit():
        return there
    return max(0, int(most) - int(used.read_text(encoding="ascii")))


def require(needed: int, what: str) -> None:
    """Refuse what does not fit, before any of it is made.

    Raises:
        InputError: fewer than `needed` bytes are available; the message begins with `what`.
    """
    if not fits(needed):
        raise InputError(
            f"{what} needs {needed / 1e9:.2g} GB beside the input and {(available() or 0) / 1e9:.2g} GB are available"
        )
