"""Decode steps on a GPU, captured and compiled: the tokens of the plain loop, and no work beside the step."""

from __future__ import annotations

import pytest
import torch
from tiny import plain_greedy, tiny_engine, tiny_model, tokens_of
from torch._dynamo.utils import counters

from axon_llm.config import ModelConfig
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.runner import Runner
from axon_llm.engine.sampling import Sampler
from axon_llm.fast import accelerate
from axon_llm.model import Transformer

WIDER = ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
    max_position_embeddings=512,
)  # fmt: skip
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def models(fast: bool) -> tuple[Transformer, Transformer]:
    """A readable model on the CPU, and the same on the GPU: as it is, or of our own kernels."""
    return tiny_model(WIDER), accelerate(tiny_model(WIDER).cuda()) if fast else tiny_model(WIDER).cuda()


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_steps_captured_in_the_middle_of_generating_give_the_tokens_of_the_plain_loop(
    compile: bool, fast: bool
) -> None:
    exact, model = models(fast)
    engine = tiny_engine(model, slots=3, compile=compile)
    for seed, length in enumerate((5, 100, 127, 250)):
        prompt = some_tokens(length, seed)
        tokens = tokens_of(engine.generate(prompt, SamplingParams(max_tokens=30, **GREEDY)))
        assert tokens == plain_greedy(exact, prompt, 30)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_after_warm_up_nothing_is_captured_or_compiled_again(compile: bool, fast: bool) -> None:
    engine = tiny_engine(models(fast)[1], slots=2, max_seq_len=200, compile=compile, speculate=3)
    engine.warm_up()
    compiled, steps = counters["stats"]["unique_graphs"], len(engine.runner._steps)
    assert not counters["graph_break"]
    for seed in range(10):
        streams = [
            engine.generate(some_tokens(10 + 15 * seed, seed + row), SamplingParams(max_tokens=40, **GREEDY))
            for row in range(1 + seed % 2)
        ]
        for _ in range(40):
            for stream in streams:
                next(stream, None)
    assert counters["stats"]["unique_graphs"] == compiled
    assert len(engine.runner._steps) == steps
    assert engine.runner.captured
    assert engine.runner.compiled == compile


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=0.8, seed=1, top_p=0.9, top_k=20, min_p=0.01),
        SamplingParams(temperature=0.8, seed=1, top_p=0.9, logprobs=2),
        SamplingParams(temperature=0.8, seed=1, repetition_penalty=1.2),
    ],
    ids=["greedy", "sampled", "filtered", "log-probabilities", "penalties"],
)
@pytest.mark.parametrize("fast", [False, True])
def test_the_host_waits_for_the_gpu_once_a_step(
    fast: bool, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(fast)[1]
    runner = Runner(model, slots=2, max_seq_len=128)
    sampler = Sampler(2, model.config.vocab_size, runner.device)
    for slot in range(2):
        sampler.set(slot, params, 3, [1, 2], [])
    reads = 0
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> object:
        nonlocal reads
        reads += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            return plain(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def step(tokens: list[int], position: int) -> list[int]:
        logits = runner.decode(tokens, [position] * 2, 128)
        return sampler.sample(logits, runner.next_positions).tokens

    tokens = step(step([5, 6], 0), 1)  # captured, tables made
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for position in range(2, 22):
            tokens = step(tokens, position)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == 20


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_no_token(temperature: float, fast: bool) -> None:
    prompt = [97, 98, 99, 100] * 10
    params = SamplingParams(max_tokens=80, temperature=temperature, seed=2, ignore_eos=True, logit_bias={97: 12.0})
    model = models(fast)[1]
    plain, fast = (tiny_engine(model, slots=1, speculate=drafts) for drafts in (0, 7))
    assert tokens_of(fast.generate(prompt, params)) == tokens_of(plain.generate(prompt, params))
    assert fast.stats().accepted_tokens > 0


@pytest.mark.parametrize("fast", [False, True])
def test_moving_sequences_between_slots_does_not_upset_captured_steps(fast: bool) -> None:
    """Sequences end one by one, so that the batch shrinks and the rest move down."""
    exact, model = models(fast)
    engine = tiny_engine(model, slots=4)
    prompts = [some_tokens(30, seed) for seed in range(4)]
    streams = [
        engine.generate(prompt, SamplingParams(max_tokens=10 * (row + 1), **GREEDY))
        for row, prompt in enumerate(prompts)
    ]
    tokens: list[list[int]] = [[] for _ in streams]
    while any(len(found) < 10 * (row + 1) for row, found in enumerate(tokens)):
        for found, stream in zip(tokens, streams, strict=True):
            found += tokens_of([event] if (event := next(stream, None)) else [])
    for row, (prompt, found) in enumerate(zip(prompts, tokens, strict=True)):
        assert found == plain_greedy(exact, prompt, 10 * (row + 1))
