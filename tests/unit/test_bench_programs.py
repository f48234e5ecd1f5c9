"""The benchmarks that are programs of their own: what they prepare is what they say."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from axon_llm import load
from axon_llm.bench import rows as bench_rows
from axon_llm.bench.rows import Case, Row
from axon_llm.bench.speculation import PERIOD, measure, permuting
from axon_llm.bench.startup import run_process, write_checkpoint
from axon_llm.checkpoint import random_model
from axon_llm.engine.generate import greedy
from axon_llm.engine.runner import Runner
from axon_llm.errors import AxonError
from axon_llm.shapes import shape_config
from cli.benchmarks import _slope


@pytest.mark.parametrize("period", [PERIOD, None])
def test_a_permuted_model_writes_the_successors(period: int | None) -> None:
    model = random_model(shape_config("tiny"), torch.device("cpu"), torch.float32)
    written = greedy(permuting(model, period), [3], 2 * PERIOD, cache=None)
    cycle = period or model.config.vocab_size
    assert list(written) == [(4 + i) % cycle for i in range(2 * PERIOD)]


def test_speculation_is_measured_on_a_text_that_repeats_and_one_that_does_not() -> None:
    rows = measure("random:tiny", None, "float32", 24, 1, compile=False)
    assert [row["text"] for row in rows] == ["repeats its prompt", "does not repeat"]
    for row in rows:  # of one repetition
        assert row["speedup"] == pytest.approx(row["plain_ms_per_token"] / row["speculating_ms_per_token"])


def test_a_checkpoint_of_a_shape_loads_as_any_other_and_holds_the_same_weights(tmp_path: Path) -> None:
    model = random_model(shape_config("tiny"), torch.device("cpu"), torch.bfloat16)
    write_checkpoint(model, "tiny", tmp_path / "tiny")
    loaded, tokenizer = load(tmp_path / "tiny", device="cpu")
    assert len(tokenizer.encode("x" * 512)) == 512
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_program_that_fails_is_not_a_measurement() -> None:
    with pytest.raises(AxonError, match="exit code 3: no weights"):
        run_process(["sh", "-c", "echo no weights >&2; exit 3"])


def test_a_program_is_timed_and_its_memory_counted() -> None:
    seconds, peak = run_process([sys.executable, "-c", "held = bytearray(b'x') * 200_000_000"])
    assert seconds > 0
    assert 200e6 < peak < 400e6


def test_each_stretch_of_a_decode_row_is_held_against_the_probes_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(shape_config("tiny"), torch.device("cpu"), torch.float32)
    runner = Runner(model, slots=1, max_seq_len=9)
    decode, steps = runner.decode, []

    def watched(tokens: list[int], at: list[int], length: int) -> torch.Tensor:
        steps.append((at[0], tokens[0]))
        return decode(tokens, at, length)

    monkeypatch.setattr(runner, "decode", watched)
    monkeypatch.setattr(bench_rows, "seconds", lambda work, device: (work(), 2.0)[1])
    # Bytes a second: steps of 10 bytes fit four times into a quarter of the first probe's, six times into the second's.
    probes = iter([160.0, 240.0, 80.0, 1e6, 1e6])
    row = Row(Case("tg", tokens=6, depth=3), bytes_per_step=10.0, flops=0.0)
    ceilings: Any = SimpleNamespace(probe_bandwidth=lambda: next(probes))
    taken, shares = bench_rows._repeat(row, runner, ceilings)
    assert (taken, shares) == (4.0, [4 * 10 / 200 / 2, 2 * 10 / 160 / 2])
    assert [position for position, _ in steps] == [3, 4, 5, 6, 7, 8]
    in_two = steps.copy()
    steps.clear()
    bench_rows._repeat(row, runner, ceilings)  # in one stretch: the tokens are the same
    assert steps == in_two


def test_what_a_longer_context_costs_does_not_depend_on_the_memory_that_each_row_met() -> None:
    # 512: 100 MB in the time of 125; 8,000: 160 MB in the time of 215. Which of them met a slow memory is not in it.
    rows = [
        {"depth": 512, "bytes_per_token": 100e6, "share_of_ceiling": 0.8, "ms_per_step": 9.0},
        {"depth": 8000, "bytes_per_token": 160e6, "share_of_ceiling": 160 / 215, "ms_per_step": 8.0},
    ]
    assert "add 60 MB" in _slope({"rows": rows})
    assert "as much as reading 90 MB takes at the bandwidth around it: 1.5 ×" in _slope({"rows": rows})
