"""Processes that tests start, and that no failure may leave behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill a process at the end of a block if it is still there."""
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()  # no effect on one that has ended and was waited for
    finally:
        process.wait()
