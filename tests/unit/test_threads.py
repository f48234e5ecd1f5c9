"""How many threads a model is worth."""

from __future__ import annotations

import pytest
import torch

from axon_llm.checkpoint import random_model
from axon_llm.fast import threads
from axon_llm.fast.threads import fit_threads
from axon_llm.shapes import shape_config


@pytest.mark.parametrize(
    ("small_bytes", "told", "asked_for"), [(1 << 30, None, [1]), (1 << 30, "2", []), (1, None, [])]
)
def test_a_small_model_gets_one_thread_unless_somebody_has_said_how_many(
    small_bytes: int, told: str | None, asked_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(threads, "SMALL_MODEL_BYTES", small_bytes)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert (
        fit_threads(random_model(shape_config("tiny"), torch.device("cpu"), torch.float32)) == torch.get_num_threads()
    )
    assert asked == asked_for
