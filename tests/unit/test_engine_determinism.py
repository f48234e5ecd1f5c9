"""The same request gives the same tokens and text, whoever runs beside it and whatever interrupts it (float32)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from tiny import byte_decoder, drain, submit, text_of, tiny_engine, tiny_model, tokens_of

from axon_llm.engine.events import Request, TokenEvent
from axon_llm.engine.params import SamplingParams

MIXES = 200


def some_params(chooser: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=chooser.randrange(1, 25),
        temperature=chooser.choice([0.0, 0.8, 1.0, 1.5]),
        top_p=chooser.choice([1.0, 0.95]),
        top_k=chooser.choice([0, 20]),
        min_p=chooser.choice([0.0, 0.02]),
        repetition_penalty=chooser.choice([1.0, 1.0, 1.2]),
        frequency_penalty=chooser.choice([0.0, 0.0, 0.3]),
        stop=chooser.choice([(), ("e", "th"), ("\x00",)]),
        logprobs=chooser.choice([None, None, 2]),
        seed=chooser.randrange(2**63),
    )


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: list[int]
    text: str


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Requests that share beginnings, each with what it gives alone in a fresh engine."""
    chooser = random.Random(17)
    stems = [tuple(chooser.randrange(256) for _ in range(chooser.randrange(0, 150))) for _ in range(6)]
    model, result = tiny_model(), []
    for _ in range(60):
        prompt = chooser.choice(stems) + tuple(chooser.randrange(256) for _ in range(chooser.randrange(1, 40)))
        params = some_params(chooser)
        events = list(tiny_engine(model).generate(prompt, params))
        result.append(Case(prompt, params, tokens_of(events), text_of(events)))
    assert len({tuple(case.tokens) for case in result}) > 50
    return result


@pytest.mark.slow
def test_tokens_and_text_do_not_depend_on_batch_mates(cases: list[Case]) -> None:
    """200 random mixes in one engine: joining and leaving, cancelling, and reusing each other's prefixes."""
    chooser = random.Random(4)
    engine = tiny_engine(tiny_model(), slots=4, prefill_chunk=64, interleave_chunk=32)
    compared = cancelled = 0
    for mix in range(MIXES):
        coming = [(f"{mix}/{i}", case) for i, case in enumerate(chooser.sample(cases, chooser.randrange(2, 9)))]
        members, events = dict(coming), dict[str, list[TokenEvent]]()
        doomed = {name for name in members if chooser.random() < 0.15}
        while coming or engine.has_work():
            while coming and chooser.random() < 0.4:
                name, case = coming.pop()
                engine.submit(Request(id=name, prompt=case.prompt, params=case.params))
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
            if doomed and chooser.random() < 0.2:
                engine.cancel(doomed.pop())
        for name, case in members.items():
            tokens, text = tokens_of(events[name]), text_of(events[name])
            if events[name][-1].finish_reason == "cancelled":
                cancelled += 1
                assert case.tokens[: len(tokens)] == tokens
            else:
                compared += 1
                assert tokens == case.tokens
                assert text == case.text
    assert compared > 3 * MIXES
    assert cancelled > MIXES // 10
    assert engine.stats().cached_tokens > 0


def test_a_completion_interrupted_anywhere_continues_as_if_it_had_not_been(cases: list[Case]) -> None:
    model = tiny_model()
    for case in [case for case in cases if len(case.tokens) > 4][:20]:
        whole = list(tiny_engine(model).generate(case.prompt, case.params))
        for index in range(len(whole)):
            engine = tiny_engine(model, slots=2)
            rest = list(engine.generate(case.prompt, case.params, generated=case.tokens[:index]))
            assert [(e.index, e.token, e.text, e.finish_reason) for e in rest] == [
                (e.index, e.token, e.text, e.finish_reason) for e in whole[index:]
            ]
            for one, other in zip(rest, whole[index:], strict=True):
                assert (one.logprob is None) == (other.logprob is None)
                assert one.logprob is None or one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert rest[-1].usage is not None
            assert rest[-1].usage.completion_tokens == len(whole)


def test_text_and_stop_strings_continue_in_the_middle_of_a_character() -> None:
    """Wherever the interruption falls: between the bytes of a character, or inside what may become a stop string."""
    spoken = "né한🙂END"
    data = list(spoken.encode())
    bias = {byte: 80.0 - i for i, byte in enumerate(dict.fromkeys(data))}
    model = tiny_model(scale=0.01)
    params = SamplingParams(
        temperature=0.0, logit_bias=bias, presence_penalty=100.0, max_tokens=len(data), stop=("🙂END",)
    )
    whole = list(tiny_engine(model).generate([0], params))
    assert tokens_of(whole) == data
    assert text_of(whole) == "né한"
    assert whole[-1].finish_reason == "stop"
    for index in range(len(data)):
        rest = list(tiny_engine(model).generate([0], params, generated=data[:index]))
        assert [event.text for event in rest] == [event.text for event in whole[index:]]


@pytest.mark.parametrize(
    ("generated", "options", "reason"),
    [
        ([10, 11, 12], {"max_tokens": 3}, "length"),
        ([10, 256], {}, "stop"),
        (list(b"abSTOP"), {"stop": ("STOP",)}, "stop"),
    ],
)
def test_a_completion_that_was_complete_already_only_ends(
    generated: list[int], options: dict[str, object], reason: str
) -> None:
    engine = tiny_engine()
    submit(engine, "x", [1, 2], generated=generated, **options)
    events = drain(engine)["x"]
    assert [(e.token, e.text, e.finish_reason, e.index) for e in events] == [(None, "", reason, len(generated))]


def test_an_engine_draws_different_seeds_for_requests_that_name_none() -> None:
    engine = tiny_engine()
    params = SamplingParams(max_tokens=12)
    assert len({tuple(tokens_of(engine.generate([1, 2, 3], params))) for _ in range(5)}) == 5


def test_text_is_that_of_the_tokens(cases: list[Case]) -> None:
    for case in cases:
        if not case.params.stop:
            decoder = byte_decoder()
            assert "".join(map(decoder.push, case.tokens)) + decoder.flush() == case.text
