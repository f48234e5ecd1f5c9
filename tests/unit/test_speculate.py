"""Speculation decides when tokens are computed, never which."""

from __future__ import annotations

import random

import pytest
from tiny import ByteTokenizer, tiny_model

from axon_llm.engine.engine import Engine
from axon_llm.engine.events import TokenEvent
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.speculate import LONGEST_PAUSE, Drafter

REPETITIVE = list(b"the cat sat. the cat sat. the cat sat. the cat")


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> list[TokenEvent]:
    return list(engine.generate(prompt, params))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_tokens_and_text_are_those_without_speculation(temperature: float) -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    plain = Engine(model, tokenizer, max_seq_len=200)
    fast = Engine(model, tokenizer, max_seq_len=200, speculate=5)
    pick = random.Random(3)
    for seed in range(12):
        prompt = REPETITIVE if seed % 2 else [pick.randrange(256) for _ in range(40)]
        params = SamplingParams(
            max_tokens=pick.randrange(1, 90),
            temperature=temperature,
            seed=seed,
            ignore_eos=seed % 3 == 0,
            top_k=pick.choice([0, 5]),
            repetition_penalty=pick.choice([1.0, 1.3]),
            stop=pick.choice([(), ("a",)]),
        )
        expected, got = run(plain, prompt, params), run(fast, prompt, params)
        assert [(e.token, e.text, e.finish_reason) for e in got] == [
            (e.token, e.text, e.finish_reason) for e in expected
        ]
        assert got[-1].usage is not None
        assert got[-1].usage.completion_tokens == len(got)


def test_accepted_drafts_save_passes() -> None:
    engine = Engine(tiny_model(), ByteTokenizer(), max_seq_len=300, speculate=7)
    always_the_same = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True, logit_bias={65: 1000.0})
    events = run(engine, REPETITIVE, always_the_same)
    stats = engine.stats()
    assert [event.token for event in events] == [65] * 200
    assert stats.accepted_tokens > 150
    assert stats.decode_steps == 200 - 1 - stats.accepted_tokens


def test_the_end_of_the_context_and_of_the_request_are_respected() -> None:
    engine = Engine(tiny_model(), ByteTokenizer(), max_seq_len=len(REPETITIVE) + 9, speculate=7)
    events = run(engine, REPETITIVE, SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    assert (len(events), events[-1].finish_reason) == (9, "length")


def test_what_a_slot_remembers_after_speculation_is_right() -> None:
    model, tokenizer = tiny_model(), ByteTokenizer()
    fast, plain = Engine(model, tokenizer, max_seq_len=300, speculate=7), Engine(model, tokenizer, max_seq_len=300)
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=1, ignore_eos=True)
    first = [e.token for e in run(fast, REPETITIVE, params)]
    follow_up = [*REPETITIVE, *(t for t in first if t is not None), 65, 66, 67]
    again = run(fast, follow_up, params)
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens >= len(REPETITIVE) + 29
    assert [e.token for e in again] == [e.token for e in run(plain, follow_up, params)]


def test_several_sequences_at_once_are_decoded_without_drafts() -> None:
    engine = Engine(tiny_model(), ByteTokenizer(), slots=2, max_seq_len=200, speculate=7)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    streams = [engine.generate(REPETITIVE, params), engine.generate(REPETITIVE[::-1], params)]
    for _ in range(20):
        for stream in streams:
            next(stream)
    assert engine.stats().draft_tokens == 0


def test_rejected_drafts_make_the_drafter_wait_ever_longer_and_accepted_ones_end_that() -> None:
    drafter = Drafter([1, 2, 3, 1, 2], 4)
    tokens = [1, 2, 3, 1, 2]
    waits = []
    for _ in range(9):
        assert drafter.draft(tokens, 10)
        drafter.record(4, 0)
        wait = 0
        while not drafter.draft(tokens, 10):
            wait += 1
        waits.append(wait)
    assert waits[:4] == [1, 2, 4, 8]
    assert max(waits) == LONGEST_PAUSE
    drafter.record(4, 3)
    assert drafter.draft(tokens, 10)
