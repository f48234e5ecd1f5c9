"""The engine as its users see it: requests in, events out."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CONFIG, EOS, drain, plain_greedy, submit, text_of, tiny_engine, tiny_model, tokens_of

from axon_llm.cache import KVCache
from axon_llm.engine.admission import slots_that_fit
from axon_llm.engine.events import Request, Timings
from axon_llm.engine.params import SamplingParams
from axon_llm.errors import RequestError, UsageError

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 130, 260])
def test_greedy_tokens_are_those_of_the_plain_loop(length: int) -> None:
    model = tiny_model()
    prompt = prompt_of(length)
    events = list(tiny_engine(model).generate(prompt, SamplingParams(max_tokens=40, **GREEDY)))
    assert tokens_of(events) == plain_greedy(model, prompt, 40)
    assert [event.index for event in events] == list(range(40))


def test_a_prompt_in_many_small_chunks_gives_the_same_tokens() -> None:
    model = tiny_model()
    prompt = prompt_of(200)
    engine = tiny_engine(model, prefill_chunk=24)
    assert tokens_of(engine.generate(prompt, SamplingParams(max_tokens=20, **GREEDY))) == plain_greedy(
        model, prompt, 20
    )
    assert engine.stats().prefill_chunks == 9


def test_a_sequence_may_fill_its_slot_to_the_last_position() -> None:
    model = tiny_model()
    for max_seq_len in (40, 64, 100):  # smaller than a bucket, a bucket, between buckets
        for length in (1, 30, max_seq_len - 1):
            engine = tiny_engine(model, max_seq_len=max_seq_len, prefill_chunk=32)
            count = max_seq_len - length
            params = SamplingParams(max_tokens=count, **GREEDY)
            tokens = tokens_of(engine.generate(prompt_of(length), params))
            assert tokens == plain_greedy(model, prompt_of(length), count)


def test_sequences_run_side_by_side_as_they_would_alone() -> None:
    model = tiny_model()
    engine = tiny_engine(model, slots=3, prefill_chunk=32)
    prompts = {f"r{i}": prompt_of(5 + 37 * i % 150, seed=i) for i in range(7)}
    for name, prompt in prompts.items():
        submit(engine, name, prompt, max_tokens=25, **GREEDY)
    events = drain(engine)
    for name, prompt in prompts.items():
        assert tokens_of(events[name]) == plain_greedy(model, prompt, 25)


def test_the_last_of_many_moves_down_and_its_steps_get_smaller() -> None:
    model = tiny_model()
    engine = tiny_engine(model, slots=4)
    rows: list[int] = []
    decode = engine.runner.decode

    def watched(tokens: list[int], positions: list[int], length: int) -> torch.Tensor:
        rows.append(len(tokens))
        return decode(tokens, positions, length)

    engine.runner.decode = watched  # type: ignore[method-assign, assignment]
    options: dict[str, Any] = {"frequency_penalty": 0.5, "seed": 9}
    for i in range(4):
        submit(engine, str(i), prompt_of(20, i), max_tokens=5 + 10 * i, ignore_eos=True, **options)
    events = drain(engine)
    assert rows[:2] == [4, 4]
    assert rows[-9:] == [1] * 9
    for i in range(4):
        params = SamplingParams(max_tokens=5 + 10 * i, ignore_eos=True, **options)
        assert tokens_of(events[str(i)]) == tokens_of(tiny_engine(model).generate(prompt_of(20, i), params))


def test_two_iterators_may_be_read_in_turn_while_other_requests_run() -> None:
    model = tiny_model()
    engine = tiny_engine(model, slots=3)
    submit(engine, "other", prompt_of(9), max_tokens=12, **GREEDY)
    one = engine.generate(prompt_of(20, 1), SamplingParams(max_tokens=12, **GREEDY))
    two = engine.generate(prompt_of(30, 2), SamplingParams(max_tokens=12, **GREEDY))
    pairs = list(zip(one, two, strict=True))
    assert tokens_of(a for a, _ in pairs) == plain_greedy(model, prompt_of(20, 1), 12)
    assert tokens_of(b for _, b in pairs) == plain_greedy(model, prompt_of(30, 2), 12)
    assert tokens_of(drain(engine)["other"]) == plain_greedy(model, prompt_of(9), 12)


# ------------------------------------------------------------------------------------------------------- how it ends


def test_it_ends_by_length_after_max_tokens() -> None:
    events = list(tiny_engine().generate(prompt_of(5), SamplingParams(max_tokens=3, **GREEDY)))
    assert [event.finish_reason for event in events] == [None, None, "length"]
    usage = events[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 3, 0)
    assert all(event.usage is None and event.timings is None for event in events[:-1])


def test_a_stop_token_has_an_event_of_its_own_without_text() -> None:
    for params in (
        SamplingParams(temperature=0.0, logit_bias={EOS: 1e4}),
        SamplingParams(temperature=0.0, logit_bias={65: 1e4}, stop_token_ids=(65,)),
    ):
        events = list(tiny_engine().generate(prompt_of(5), params))
        assert [(event.finish_reason, event.text) for event in events] == [("stop", "")]
        assert events[0].token in (EOS, 65)
        assert events[0].usage is not None
        assert events[0].usage.completion_tokens == 1


def test_ignored_end_tokens_do_not_end_it() -> None:
    params = SamplingParams(temperature=0.0, logit_bias={EOS: 1e4}, ignore_eos=True, max_tokens=4)
    assert tokens_of(tiny_engine().generate(prompt_of(5), params)) == [EOS] * 4


def say(text: str, **options: Any) -> list[Any]:
    """The events of a completion that is made to say ``text``, whose bytes are all different.

    The model's own wishes are tiny; each byte is biased a little below the one before it, and penalised once said.
    """
    data = text.encode()
    assert len(set(data)) == len(data)
    params = SamplingParams(
        temperature=0.0,
        logit_bias={byte: 80.0 - i for i, byte in enumerate(data)},
        presence_penalty=100.0,
        max_tokens=len(data),
        **options,
    )
    return list(tiny_engine(tiny_model(scale=0.01)).generate([0], params))


def test_text_before_a_stop_string_comes_out_and_the_string_does_not() -> None:
    events = say("Hi bye", stop=("by",))
    assert text_of(events) == "Hi "
    assert events[-1].finish_reason == "stop"
    assert events[-1].token == ord("y")


def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    events = say("abc", stop=("cd",))
    assert [event.text for event in events] == ["a", "b", "c"]
    assert events[-1].finish_reason == "length"


def test_every_event_holds_whole_characters_only() -> None:
    events = say("é한🙂")
    assert [event.text for event in events] == ["", "é", "", "", "한", "", "", "", "🙂"]


def test_cancelling_ends_a_running_and_a_waiting_request_and_spares_the_others() -> None:
    model = tiny_model()
    engine = tiny_engine(model, slots=1)
    submit(engine, "running", prompt_of(10), max_tokens=30, **GREEDY)
    submit(engine, "waiting", prompt_of(10, 1), max_tokens=30, **GREEDY)
    submit(engine, "last", prompt_of(10, 2), max_tokens=5, **GREEDY)
    early = [event for _ in range(5) for event in engine.step()]
    engine.cancel("running")
    engine.cancel("waiting")
    engine.cancel("never heard of")
    events = drain(engine)
    assert [(e.finish_reason, e.token) for e in events["running"]] == [("cancelled", None)]
    assert events["running"][0].index == len(early)
    assert [(e.finish_reason, e.token) for e in events["waiting"]] == [("cancelled", None)]
    assert tokens_of(events["last"]) == plain_greedy(model, prompt_of(10, 2), 5)
    assert engine.stats().finished == {"stop": 0, "length": 1, "cancelled": 2, "error": 0}


def test_a_step_that_fails_loses_no_event_and_may_be_tried_again() -> None:
    model = tiny_model()
    engine = tiny_engine(model, slots=2)
    submit(engine, "first", prompt_of(10), max_tokens=10, **GREEDY)
    events = engine.step()
    submit(engine, "second", prompt_of(10, 1), max_tokens=10, **GREEDY)
    prefill = engine.runner.prefill

    def fails(*args: object) -> torch.Tensor:
        raise MemoryError("no room")

    engine.runner.prefill = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryError):
        engine.step()  # the first sequence's decode step went well before that
    engine.runner.prefill = prefill  # type: ignore[method-assign]
    rest = drain(engine)
    assert tokens_of(events + rest["first"]) == plain_greedy(model, prompt_of(10), 10)
    assert tokens_of(rest["second"]) == plain_greedy(model, prompt_of(10, 1), 10)


def test_closing_the_iterator_frees_the_slot() -> None:
    engine = tiny_engine(slots=1)
    events = engine.generate(prompt_of(10), SamplingParams(max_tokens=30, **GREEDY))
    next(events)
    assert engine.stats().running == 1
    events.close()
    assert not engine.has_work()
    assert engine.stats().running == 0


def test_closing_the_iterator_of_a_penalised_request_clears_its_tables() -> None:
    engine = tiny_engine(slots=1)
    options = {"presence_penalty": 100.0, "logit_bias": {3: 100.0, 4: 1.0}}
    events = engine.generate(prompt_of(10), SamplingParams(max_tokens=30, **GREEDY, **options))
    next(events)
    events.close()
    expected = plain_greedy(engine.model, prompt_of(10), 10)
    assert tokens_of(engine.generate(prompt_of(10), SamplingParams(max_tokens=10, **GREEDY))) == expected


def test_an_iterator_that_is_never_read_costs_nothing() -> None:
    engine = tiny_engine(slots=1)
    unread = engine.generate(prompt_of(10))
    assert not engine.has_work()
    del unread


def test_a_request_past_its_deadline_ends_with_an_error_wherever_it_is() -> None:
    engine = tiny_engine(slots=1)
    submit(engine, "late", prompt_of(10), max_tokens=300, deadline_unix_s=time.time() - 1, **GREEDY)
    submit(engine, "in time", prompt_of(10), max_tokens=2, deadline_unix_s=time.time() + 1e6, **GREEDY)
    events = drain(engine)
    assert [event.finish_reason for event in events["late"]] == ["error"]
    assert "deadline" in (events["late"][0].error or "")
    assert events["in time"][-1].finish_reason == "length"


def test_a_model_whose_output_is_not_a_number_ends_that_request_with_an_error() -> None:
    model = tiny_model()
    model.embed_tokens.weight[7] = float("nan")
    engine = tiny_engine(model, slots=2)
    submit(engine, "bad", [1, 7, 1], max_tokens=5, **GREEDY)
    submit(engine, "good", [1, 2, 3], max_tokens=5, logit_bias={7: -1e4}, **GREEDY)
    events = drain(engine)
    assert [(e.finish_reason, e.error) for e in events["bad"]] == [("error", "the model's output is not a number")]
    assert events["good"][-1].finish_reason == "length"


def test_a_slot_that_held_not_a_numbers_is_no_danger_to_the_next_sequence() -> None:
    model = tiny_model()
    expected = plain_greedy(model, prompt_of(8, 3), 10)
    model.embed_tokens.weight[7] = float("nan")
    engine = tiny_engine(model, slots=1)
    list(engine.generate([1, 7] * 40, SamplingParams(max_tokens=5, **GREEDY)))
    assert 7 not in prompt_of(8, 3)
    assert tokens_of(engine.generate(prompt_of(8, 3), SamplingParams(max_tokens=10, **GREEDY))) == expected


# --------------------------------------------------------------------------------------------------------- admission


def test_an_iterator_whose_request_has_ended_leaves_the_next_one_of_that_id_alone() -> None:
    model = tiny_model()
    engine = tiny_engine(model)
    params = SamplingParams(max_tokens=10, **GREEDY)
    for leave in (lambda iterator: iterator.close(), lambda iterator: next(iterator, None)):
        first = engine.generate(prompt_of(8), params, request_id="x")
        for _ in range(10):  # up to its last event, but not to its end
            event = next(first)
        assert event.finish_reason == "length"
        second = engine.generate(prompt_of(9, 1), params, request_id="x")
        events = [next(second)]
        leave(first)
        assert tokens_of([*events, *second]) == plain_greedy(model, prompt_of(9, 1), 10)


def test_a_warm_up_in_between_is_not_taken_for_what_slots_remember() -> None:
    model = tiny_model()
    engine = tiny_engine(model)
    params = SamplingParams(max_tokens=10, **GREEDY)
    first = tokens_of(engine.generate(prompt_of(100), params))
    running = engine.generate(prompt_of(100), params)
    next(running)
    with pytest.raises(UsageError, match="warmed up"):
        engine.warm_up()
    running.close()
    engine.warm_up()
    events = list(engine.generate(prompt_of(100), params))
    assert tokens_of(events) == first
    assert events[-1].usage is not None
    assert events[-1].usage.cached_tokens == 0


def test_a_stop_string_that_names_a_special_token_stops_at_that_token() -> None:
    params = SamplingParams(max_tokens=20, stop=("<end>",), logit_bias={EOS: 100.0}, **GREEDY)
    events = list(tiny_engine().generate(prompt_of(5), params))
    assert tokens_of(events) == [EOS]
    assert events[-1].finish_reason == "stop"


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = tiny_engine(max_seq_len=100)
    with pytest.raises(RequestError) as caught:
        engine.generate(prompt_of(60), SamplingParams(max_tokens=41))
    assert caught.value.code == "context_length_exceeded"
    assert all(number in caught.value.message for number in ("100", "101", "60", "41"))
    assert "40" in caught.value.hint
    list(engine.generate(prompt_of(60), SamplingParams(max_tokens=40)))


@pytest.mark.parametrize("asked", [-1, 0, 321])
def test_a_cache_longer_than_the_models_context_is_refused_with_both_lengths(asked: int) -> None:
    with pytest.raises(UsageError, match=rf"from 1 to 320, .*not {asked}"):
        tiny_engine(max_seq_len=asked)
    assert tiny_engine(max_seq_len=320).max_seq_len == tiny_engine().max_seq_len == 320


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ([], {}, "prompt"),
        ([0, 257], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([0], {"logit_bias": {257: 1.0}}, "logit_bias"),
        ([0], {"stop_token_ids": (300,)}, "stop_token_ids"),
    ],
)
def test_requests_that_make_no_sense_are_refused_by_the_name_of_the_field(
    prompt: list[int], options: dict[str, Any], param: str
) -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError) as caught:
        submit(engine, "x", prompt, max_tokens=2, **options)
    assert caught.value.param == param
    assert not engine.has_work()


def test_an_id_in_use_is_refused_and_may_be_used_again_afterwards() -> None:
    engine = tiny_engine()
    submit(engine, "x", [1], max_tokens=2)
    with pytest.raises(RequestError, match="'x'"):
        submit(engine, "x", [1], max_tokens=2)
    drain(engine)
    submit(engine, "x", [1], max_tokens=2)
    drain(engine)


def test_requests_wait_in_order_when_all_slots_are_busy() -> None:
    engine = tiny_engine(slots=2)
    for i in range(6):
        submit(engine, str(i), prompt_of(5, i), max_tokens=3 + i % 2, **GREEDY)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 6)
    order = []
    while engine.has_work():
        order += [event.request_id for event in engine.step() if event.index == 0]
        assert engine.stats().running <= 2
    assert order == [str(i) for i in range(6)]


def test_slots_that_fit_follow_from_the_formula() -> None:
    one = KVCache(CONFIG, max_seq_len=64, dtype=torch.bfloat16).nbytes
    for memory, slots in ((0, 0), (-5, 0), (one - 1, 0), (one, 1), (10 * one + 1, 10)):
        assert slots_that_fit(CONFIG, memory, max_seq_len=64, dtype=torch.bfloat16) == slots


# ------------------------------------------------------------------------------------------------- reuse and figures


def test_the_next_turn_reuses_the_keys_and_values_of_the_last() -> None:
    model = tiny_model()
    engine = tiny_engine(model, slots=2)
    prompt = prompt_of(100)
    first = tokens_of(engine.generate(prompt, SamplingParams(max_tokens=20, **GREEDY)))
    turn = [*prompt, *first, *prompt_of(30, 5)]
    events = list(engine.generate(turn, SamplingParams(max_tokens=20, **GREEDY)))
    assert events[-1].usage is not None
    assert events[-1].usage.cached_tokens == 119  # all but the last token of the first answer, which was never run
    assert tokens_of(events) == plain_greedy(model, turn, 20)


def test_a_prefix_is_copied_from_a_sequence_that_still_runs() -> None:
    model = tiny_model()
    engine = tiny_engine(model, slots=2)
    shared = prompt_of(120)
    submit(engine, "first", [*shared, 1], max_tokens=30, **GREEDY)
    for _ in range(4):
        engine.step()
    submit(engine, "second", [*shared, 2], max_tokens=30, **GREEDY)
    events = drain(engine)["second"]
    assert tokens_of(events) == plain_greedy(model, [*shared, 2], 30)
    assert events[-1].usage is not None
    assert events[-1].usage.cached_tokens == 120


def test_stats_count_what_happened() -> None:
    engine = tiny_engine(slots=2, max_seq_len=64)
    submit(engine, "a", prompt_of(10), max_tokens=4, **GREEDY)
    engine.step()
    engine.step()
    stats = engine.stats()
    position_bytes = engine.cache.nbytes // (2 * 64)
    assert (stats.running, stats.slots, stats.cache_bytes) == (1, 2, engine.cache.nbytes)
    assert stats.cache_bytes_in_use == 11 * position_bytes
    drain(engine)
    list(engine.generate(prompt_of(10), SamplingParams(max_tokens=2, **GREEDY)))
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (20, 9, 6)
    assert stats.cache_bytes_in_use == 0
    assert stats.finished["length"] == 2


def test_timings_are_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([107.0, 110.0, 111.5, 114.0, 120.0, 121.0])  # begun, four tokens, the end
    monkeypatch.setattr("axon_llm.engine.completion.time", SimpleNamespace(monotonic=lambda: next(clock)))
    request = Request(id="a", prompt=(1,), params=SamplingParams(max_tokens=4, **GREEDY), submitted_at=100.0)
    engine = tiny_engine()
    engine.submit(request)
    timings = drain(engine)["a"][-1].timings
    assert timings == Timings(queue_s=7.0, ttft_s=10.0, tpot_s=(20.0 - 10.0) / 3, total_s=21.0)


def test_timings_are_ordered_and_complete() -> None:
    events = list(tiny_engine().generate(prompt_of(10), SamplingParams(max_tokens=5, **GREEDY)))
    timings = events[-1].timings
    assert timings is not None
    assert timings.ttft_s is not None
    assert timings.tpot_s is not None
    assert 0 <= timings.queue_s <= timings.ttft_s <= timings.total_s
    assert timings.ttft_s + 4 * timings.tpot_s <= timings.total_s + 1e-6


def test_logprobs_come_with_every_token_when_asked_for() -> None:
    events = list(tiny_engine().generate(prompt_of(10), SamplingParams(max_tokens=3, logprobs=2, temperature=0.0)))
    for event in events:
        assert event.logprob is not None
        assert event.top_logprobs[0] == (event.token, pytest.approx(event.logprob))
        assert len(event.top_logprobs) == 2
    plain = list(tiny_engine().generate(prompt_of(10), SamplingParams(max_tokens=3)))
    assert all(event.logprob is None and event.top_logprobs == () for event in plain)


def test_a_long_prompt_delays_the_others_by_one_bounded_chunk_per_step() -> None:
    engine = tiny_engine(slots=2, prefill_chunk=128, interleave_chunk=32)
    submit(engine, "talking", prompt_of(10), max_tokens=60, **GREEDY)
    for _ in range(3):
        engine.step()
    submit(engine, "long", prompt_of(250, 1), max_tokens=5, **GREEDY)
    steps_before_its_first_token = 0
    while True:
        before = engine.cache.k[:, 1, 0, :, 0].ne(0).any(0).sum()
        events = engine.step()
        assert events[0].request_id == "talking"
        assert engine.cache.k[:, 1, 0, :, 0].ne(0).any(0).sum() - before <= 32
        if any(event.request_id == "long" for event in events):
            break
        steps_before_its_first_token += 1
    assert steps_before_its_first_token == 7  # 250 tokens in chunks of 32
