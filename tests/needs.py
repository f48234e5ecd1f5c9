"""What a test needs of the machine: skipped without, but in CI a failure."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

from tests.integration.servers import missing_programs


def need(*programs: str) -> None:
    """Skip a test whose programs this machine lacks."""
    servers = {"redis-server", "rabbitmq-server", "nginx"}
    missing = missing_programs(*sorted(servers.intersection(programs)))
    missing += [name for name in programs if name not in servers and shutil.which(name) is None]
    if missing:
        _lacks(", ".join(missing))


def need_module(name: str) -> ModuleType:
    """Import a module of the ``dev`` extra, or skip."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        _lacks(f"the Python package {name}")


def _lacks(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {what}")
    pytest.skip(f"needs {what}", allow_module_level=True)
