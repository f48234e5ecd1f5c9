"""Logging of the long-running commands: one line for each event, on standard error."""

from __future__ import annotations

import logging
import sys

from axon_llm.errors import UsageError

LEVELS = ("debug", "info", "warning", "error")


def configure_logging(level: str) -> None:
    """Set up logging for a server process.

    Raises:
        UsageError: no such level.
    """
    if level.lower() not in LEVELS:
        raise UsageError(f"{level!r} is no log level.", f"One of {', '.join(LEVELS)}.")
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    # pika reports every failed attempt with a traceback; the broker's own link says the same in a line.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
