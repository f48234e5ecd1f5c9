"""Steps in bucketed shapes give the logits of the plain model, compiled or not, and never compile again."""

from __future__ import annotations

import copy
import random
import warnings
from dataclasses import replace
from functools import partialmethod
from typing import Any, ClassVar

import pytest
import torch
from tiny import CONFIG, plain_greedy, tiny_engine, tiny_model, tokens_of
from torch._dynamo.utils import counters

import axon_llm.engine.runner as runner_module
from axon_llm.cache import KVCache
from axon_llm.engine.buckets import Buckets, Sizes
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.runner import Runner

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_logits(tokens: list[int]) -> torch.Tensor:
    """Logits after every token, without a cache, ``[T, V]``."""
    logits: torch.Tensor = tiny_model()(torch.tensor([tokens]), torch.arange(len(tokens))[None])
    return logits[0]


# ----------------------------------------------------------------------------------------------------------- buckets


def test_sizes_round_up_and_end_with_the_largest() -> None:
    sizes = Sizes.up_to(300, [16, 128, 256, 512])
    assert sizes.values == (16, 128, 256, 300)
    assert [sizes.at_least(n) for n in (1, 16, 17, 256, 257, 300)] == [16, 16, 128, 256, 300, 300]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("slots", "max_seq_len", "chunk"), [(1, 1, 1), (1, 100, 512), (3, 128, 16), (8, 4096, 512)])
def test_every_size_that_can_be_asked_for_has_a_bucket_that_fits(
    static: bool, slots: int, max_seq_len: int, chunk: int
) -> None:
    buckets = Buckets.choose(slots=slots, max_seq_len=max_seq_len, prefill_chunk=chunk, static=static)
    for sizes, largest in (
        (buckets.rows, slots),
        (buckets.lengths, max_seq_len),
        (buckets.chunks, min(chunk, max_seq_len)),
    ):
        for size in range(1, largest + 1):
            assert size <= sizes.at_least(size) <= largest


def test_where_the_unused_tail_costs_nothing_every_step_has_one_length() -> None:
    sizes = {"slots": 4, "max_seq_len": 4096, "prefill_chunk": 512}
    assert Buckets.choose(**sizes, static=True, tail_is_free=True).lengths.values == (4096,)
    assert len(Buckets.choose(**sizes, static=True).lengths.values) > 4
    eager = Buckets.choose(**sizes, static=False)
    assert Buckets.choose(**sizes, static=False, tail_is_free=True) == eager


def test_the_runner_asks_the_attention_whether_the_tail_is_free() -> None:
    def lengths(free: bool, dtype: torch.dtype) -> int:
        model = copy.deepcopy(tiny_model())
        for block in model.layers:
            block.self_attn.skips_hidden = free  # type: ignore[assignment]
        runner = Runner(model, slots=1, max_seq_len=512, dtype=dtype, compile=True)
        return len(runner.buckets.lengths.values)

    assert lengths(True, torch.bfloat16) == 1
    assert lengths(True, torch.float32) == lengths(False, torch.bfloat16) > 1


# ----------------------------------------------------------------------------------------------------------- prefill


@pytest.mark.parametrize("max_seq_len", [100, 128, 320])
def test_prefill_in_any_chunks_gives_the_logits_of_one_pass(max_seq_len: int) -> None:
    tokens = some_tokens(100)
    expected = plain_logits(tokens)
    chooser = random.Random(max_seq_len)
    for _ in range(20):
        runner = Runner(tiny_model(), slots=2, max_seq_len=max_seq_len, prefill_chunk=48)
        runner.cache.k.normal_()  # what other sequences left behind
        runner.cache.v.normal_()
        start = 0
        while start < len(tokens):
            end = min(len(tokens), start + chooser.randrange(1, 49))
            logits = runner.prefill(1, tokens, start, end)
            torch.testing.assert_close(logits[0], expected[end - 1], atol=1e-4, rtol=1e-4)
            start = end


def test_padding_at_the_end_of_a_slot_leaves_other_slots_alone() -> None:
    runner = Runner(tiny_model(), slots=3, max_seq_len=50, prefill_chunk=32)
    runner.cache.k.fill_(7.0)
    tokens = some_tokens(50)
    for start, end in ((0, 32), (32, 49), (49, 50)):
        runner.prefill(1, tokens, start, end)
    assert (runner.cache.k[:, [0, 2]] == 7.0).all()


# ------------------------------------------------------------------------------------------------------------ decode


def test_a_decode_step_gives_each_row_the_logits_of_its_own_sequence() -> None:
    sequences = [some_tokens(length, seed=length) for length in (3, 40, 17)]
    runner = Runner(tiny_model(), slots=4, max_seq_len=320)
    for slot, tokens in enumerate(sequences):
        runner.prefill(slot, tokens, 0, len(tokens) - 1)
    logits = runner.decode([t[-1] for t in sequences], [len(t) - 1 for t in sequences], 128)
    for row, tokens in enumerate(sequences):
        torch.testing.assert_close(logits[row], plain_logits(tokens)[-1], atol=1e-4, rtol=1e-4)


def test_positions_beyond_the_length_read_are_not_touched() -> None:
    runner = Runner(tiny_model(), slots=2, max_seq_len=320)
    runner.cache.k[:, :, :, 128:] = float("nan")
    runner.cache.v[:, :, :, 128:] = float("nan")
    assert runner.decode([5, 6], [0, 127], 128).isfinite().all()


def test_copy_and_swap_move_keys_and_values_of_every_layer() -> None:
    runner = Runner(tiny_model(), slots=3, max_seq_len=20)
    runner.cache.k.normal_()
    runner.cache.v.normal_()
    k, v = runner.cache.k.clone(), runner.cache.v.clone()
    runner.copy(0, 2, 7)
    runner.swap(1, 2, 5)
    for now, before in ((runner.cache.k, k), (runner.cache.v, v)):
        assert torch.equal(now[:, 0], before[:, 0])
        assert torch.equal(now[:, 1, :, :5], before[:, 0, :, :5])
        assert torch.equal(now[:, 1, :, 5:], before[:, 1, :, 5:])
        assert torch.equal(now[:, 2, :, :5], before[:, 1, :, :5])
        assert torch.equal(now[:, 2, :, 5:7], before[:, 0, :, 5:7])
        assert torch.equal(now[:, 2, :, 7:], before[:, 2, :, 7:])


def test_the_cache_has_the_dtype_asked_for_or_the_model_s() -> None:
    model = tiny_model().to(torch.bfloat16)
    assert Runner(model, slots=1, max_seq_len=8).cache.k.dtype == torch.bfloat16
    assert Runner(model, slots=1, max_seq_len=8, dtype=torch.float32).cache.k.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- compiled

# torch's own modules warn of torch's own deprecations when the compiler is first imported.
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@compiling
@pytest.mark.slow
def test_after_warm_up_nothing_is_compiled_again_and_tokens_are_those_of_the_plain_loop() -> None:
    """200 random prompt and generation lengths through every bucket, alone and side by side."""
    model = tiny_model(replace(CONFIG, num_layers=1, layer_windows=()))
    engine = tiny_engine(model, slots=2, max_seq_len=200, compile=True)
    engine.warm_up()
    shapes = len(engine.runner.buckets.rows.values) * len(engine.runner.buckets.lengths.values)
    assert shapes == 4
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= shapes
    assert not counters["graph_break"]
    chooser = random.Random(3)
    for turn in range(100):
        lengths = [chooser.randrange(1, 180) for _ in range(2)]
        counts = [chooser.randrange(1, min(30, 201 - length)) for length in lengths]
        prompts = [some_tokens(length, seed=turn) for length in lengths]
        streams = [
            engine.generate(prompt, SamplingParams(max_tokens=count, **GREEDY))
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        first = [next(stream) for stream in streams]
        for prompt, count, event, stream in zip(prompts, counts, first, streams, strict=True):
            assert tokens_of([event, *stream]) == plain_greedy(model, prompt, count)
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


@compiling
@pytest.mark.slow
def test_a_compiled_step_writes_the_cache_in_place_and_copies_none_of_it() -> None:
    from torch._inductor.utils import run_and_get_code

    from axon_llm.engine.compiled import CompiledStep

    cache = KVCache(CONFIG, slots=2, max_seq_len=300)
    step = CompiledStep(tiny_model(), cache.view(slots=2, length=160), lambda: None)
    with torch.inference_mode():
        _, code = run_and_get_code(step, torch.tensor([[1], [2]]), torch.tensor([[3], [4]]))
    assert "(2, 2, 160, 8), (4800, 2400, 8, 1)" in code[0]  # the view's shape and strides, as an input
    assert "empty_strided_cpu((2, 2, 160, 8)" not in code[0]


def test_where_there_is_no_compiler_a_warning_says_so_and_the_plain_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object, **options: object) -> object:
        def call(*args: object) -> None:
            raise RuntimeError("no C++ compiler\nand a long explanation")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    model = tiny_model()
    engine = tiny_engine(model, slots=2, compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.warm_up()
    assert [str(w.message) for w in caught] == [
        "the decode step cannot be compiled and runs uncompiled: no C++ compiler"
    ]
    prompt = some_tokens(30)
    assert tokens_of(engine.generate(prompt, SamplingParams(max_tokens=9, **GREEDY))) == plain_greedy(model, prompt, 9)


# ---------------------------------------------------------------------------------------------------------- captured


class ReplayedStep:
    """What a captured step is to the runner, without a GPU: shapes that never change, a result that is overwritten."""

    made: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, step: Any, pool: object, on_failure: object) -> None:
        self._step, self._shape, self._result = step, (0,), torch.empty(0)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not self._result.numel():
            self._shape, self._result = tuple(tokens.shape), self._step(tokens, positions).clone()
            self.made.append(self._shape)
        assert tuple(tokens.shape) == self._shape
        return self._result.copy_(self._step(tokens, positions))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Runners capture, or so they think; returns the shapes (rows, tokens) of what they captured."""
    monkeypatch.setattr(runner_module, "CapturedStep", ReplayedStep)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Runner, "__init__", partialmethod(Runner.__init__, capture=True))
    monkeypatch.setattr(ReplayedStep, "made", [])
    return ReplayedStep.made


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.2])
def test_a_captured_verification_has_one_shape_and_changes_no_token(
    captured: list[tuple[int, ...]], temperature: float, repetition_penalty: float
) -> None:
    prompt = [97, 98, 99, 100] * 10
    for room in (60, 41 + 30, 200):  # up to the very end of the slot, and not
        params = SamplingParams(
            max_tokens=min(100, room - 40),
            temperature=temperature,
            seed=5,
            ignore_eos=True,
            repetition_penalty=repetition_penalty,
            logit_bias={97: 20.0, 98: 20.0},
        )
        plain = tiny_engine(slots=2, max_seq_len=room)
        fast = tiny_engine(slots=2, max_seq_len=room, speculate=7)
        assert tokens_of(fast.generate(prompt, params)) == tokens_of(plain.generate(prompt, params))
        assert fast.stats().draft_tokens > 0
    assert set(captured) == {(1, 1), (1, 8)}


def test_warm_up_captures_every_shape_that_will_be_asked_for(captured: list[tuple[int, ...]]) -> None:
    engine = tiny_engine(slots=4, max_seq_len=300, speculate=7)
    engine.warm_up()
    shapes = sorted(captured)
    assert set(shapes) == {(1, 1), (2, 1), (4, 1), (1, 8)}
    for slots in (1, 4):
        streams = [
            engine.generate(some_tokens(200, seed), SamplingParams(max_tokens=60, **GREEDY)) for seed in range(slots)
        ]
        for stream in streams:
            tokens_of(stream)
    assert sorted(captured) == shapes


def test_a_step_that_cannot_be_captured_is_still_compiled_and_the_other_way_round(
    captured: list[tuple[int, ...]],
) -> None:
    runner = Runner(tiny_model(), slots=1, max_seq_len=300, compile=True)
    runner._stop_compiling()
    runner.decode([1], [0], 128)
    assert captured == [(1, 1)]
    assert (runner.compiled, runner.captured) == (False, True)
