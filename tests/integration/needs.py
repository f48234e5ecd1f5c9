"""What a test needs of the machine."""

from __future__ import annotations

import os

import pytest

from tests.integration.servers import missing_programs


def need(*programs: str) -> None:
    """Skip a test whose servers this machine lacks; in CI that is a failure."""
    missing = missing_programs(*programs)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
