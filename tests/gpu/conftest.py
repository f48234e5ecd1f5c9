"""Tests that need a CUDA device. They import nothing that is not on a bare GPU machine, and skip where there is none.

Such a machine has PyTorch, Triton, safetensors, tokenizers, typer, rich, transformers and pytest, no more
(``tests/structure/test_gpu_tests.py`` holds this folder to that).
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))  # the tiny model of the unit tests

HERE = Path(__file__).resolve().parent


def pytest_configure(config: pytest.Config) -> None:
    # Where the project's own configuration is not read, its markers are not known.
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            # torch warns of its own deprecations when the compiler is first imported, and of settings it would like
            ignored = ("DeprecationWarning", "FutureWarning", "UserWarning")
            item.add_marker(pytest.mark.filterwarnings(*(f"ignore::{kind}" for kind in ignored)))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def nothing_is_left_of_earlier_tests() -> None:
    """What earlier tests captured must not be freed in the middle of this one: some count bytes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
