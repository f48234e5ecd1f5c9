"""The figures of a comparison: growth exponents that can be trusted, and what a bench row is held against."""

from __future__ import annotations

import random

import pytest
import torch

from axon_llm.bench import compare as comparing
from axon_llm.bench.compare import Choice, Comparison, Mismatch, Side, compare, growth_exponent
from axon_llm.bench.rows import Case, prefill_flops, step_bytes
from axon_llm.engine.runner import Runner
from axon_llm.errors import AxonError, RequestError
from tests.unit.tiny import CONFIG, plain_greedy, tiny_model

PROMPT = list(b"what is remembered")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_growth_exponent_of_a_power_is_that_power(power: float) -> None:
    positions = list(range(10, 500))
    assert growth_exponent(positions, [1e-3 * n**power for n in positions]) == pytest.approx(power, abs=0.02)


def test_a_few_disturbed_steps_do_not_move_the_growth_exponent() -> None:
    noise = random.Random(0)
    positions = list(range(10, 500))
    times = [1e-5 * n * (50 if noise.random() < 0.05 else 1) for n in positions]
    assert growth_exponent(positions, times) == pytest.approx(1.0, abs=0.1)


def test_too_little_is_not_fitted() -> None:
    assert growth_exponent([10, 11, 12], [1, 1, 1]) is None
    assert growth_exponent(list(range(1000, 1100)), [1.0] * 100) is None, "less than a doubling of the context"
    assert growth_exponent([], []) is None


def test_both_runs_choose_what_the_readable_loop_chooses() -> None:
    model = tiny_model()
    outcome = compare(model, PROMPT, 60)
    assert outcome.mismatch is None
    assert outcome.cached.tokens == plain_greedy(model, PROMPT, 60)
    assert outcome.cache_bytes_formula == outcome.cache_bytes_allocated


def test_a_prompt_of_several_chunks_compares_too() -> None:
    prompt = [(7 * i) % 256 for i in range(200)]
    assert compare(tiny_model(), prompt, 8).mismatch is None


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(RequestError, match="18 prompt tokens and 400 more do not fit the context of 320"):
        compare(tiny_model(), PROMPT, 400)


def test_progress_counts_to_the_end() -> None:
    seen: list[int] = []
    compare(tiny_model(), PROMPT, 5, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_the_first_difference_is_the_one_reported() -> None:
    one = Side([Choice(1, 0.5), Choice(2, 0.25), Choice(3, 1.0)], [0.1, 0.1, 0.1])
    other = Side([Choice(1, 0.5), Choice(9, 0.01), Choice(4, 1.0)], [0.2, 0.2, 0.2])
    outcome = Comparison(4, one, other, 1, 1)
    assert outcome.mismatch is not None
    assert (outcome.mismatch.index, outcome.mismatch.cached, outcome.mismatch.uncached) == (
        1,
        Choice(2, 0.25),
        Choice(9, 0.01),
    )
    assert outcome.near_ties == 1
    assert outcome.speedup == pytest.approx(2.0)


def test_a_difference_is_a_near_tie_only_if_neither_run_was_sure() -> None:
    assert Mismatch(0, Choice(1, 0.01), Choice(2, 0.0), 0.05).near_tie
    assert not Mismatch(0, Choice(1, 0.01), Choice(2, 0.25), 0.05).near_tie
    assert not Mismatch(0, Choice(1, 0.25), Choice(2, 0.01), 0.05).near_tie


def test_what_counts_as_a_tie_depends_on_the_dtype() -> None:
    assert compare(tiny_model(), PROMPT, 2).tolerance == 1e-4
    assert compare(tiny_model().bfloat16(), PROMPT, 2).tolerance == 0.05


def test_a_model_that_computes_no_numbers_is_an_error_and_not_the_same_tokens() -> None:
    model = tiny_model()
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(AxonError, match="not a number"):
        compare(model, PROMPT, 2)


def test_of_equal_logits_both_runs_take_the_first_as_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, CONFIG.vocab_size)
    logits[0, [40, 90, 200]] = 3.0
    monkeypatch.setattr(comparing, "_cached_step", lambda *_, **__: logits)
    monkeypatch.setattr(comparing, "_uncached_step", lambda *_: logits)
    outcome = compare(tiny_model(), PROMPT, 2)
    assert outcome.cached.choices == outcome.uncached.choices == [Choice(40, 0.0)] * 2


def test_a_decode_step_reads_the_weights_once_and_each_sequence_cache() -> None:
    runner = Runner(tiny_model(), slots=3, max_seq_len=64)
    per_position = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    # One token at depth 10: its own position and the ten before it.
    assert step_bytes(CONFIG, Case("tg", 1, 10), 1000, runner) == 1000 + 11 * per_position
    # Three tokens from nothing: one, two and three positions, two on average; and that for each sequence.
    assert step_bytes(CONFIG, Case("tg", 3, 0, 3), 1000, runner) == 1000 + 3 * 2 * per_position


def test_prefill_operations_are_two_per_weight_and_token_with_one_row_of_the_output_layer() -> None:
    weights = sum(
        weight.numel()
        for name, weight in tiny_model().named_parameters()
        if weight.dim() == 2 and not name.startswith(("embed_tokens", "lm_head"))
    )
    tokens = 100
    attention = 2 * 2 * (tokens * tokens / 2) * CONFIG.num_heads * CONFIG.head_dim * CONFIG.num_layers
    output = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert prefill_flops(CONFIG, tokens) == pytest.approx(2 * weights * tokens + attention + output, rel=0.01)
