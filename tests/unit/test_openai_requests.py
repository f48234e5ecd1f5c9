from typing import Any

import pytest

from axon_llm.engine.params import SamplingParams
from axon_llm.serving.http_errors import ApiError
from axon_llm.serving.openai_requests import Generation, read_generation
from axon_llm.serving.wire import Sampling


def chat(**changes: Any) -> Generation:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **changes}
    return read_generation(body, chat=True)


def refusal(**changes: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**changes)
    assert caught.value.status == 400
    return caught.value


def test_everything_accepted_fits_the_wire_and_the_engine() -> None:
    every = {
        "max_tokens": 7, "temperature": 2, "top_p": 0.5, "top_k": 2**31 - 1, "min_p": 1, "repetition_penalty": 10,
        "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"5": -100, "6": 1.5}, "stop": ["a", "b"],
        "stop_token_ids": [0, 9], "ignore_eos": True, "seed": 2**63 - 1, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip
    sampling = chat(**every).sampling
    wired = Sampling(**sampling)
    assert SamplingParams(**wired.model_dump()).logit_bias == {5: -100.0, 6: 1.5}
    assert wired.logprobs == 20


def test_a_seed_is_drawn_where_none_is_given_and_two_are_not_the_same() -> None:
    assert chat().sampling["seed"] != chat().sampling["seed"]
    assert chat(seed=0).sampling["seed"] == 0
    for seed in (-1, -(2**63)):  # OpenAI takes any 64-bit integer
        assert Sampling(**chat(seed=seed, max_tokens=1).sampling).seed == chat(seed=seed).sampling["seed"] >= 0
    assert chat(seed=-1).sampling["seed"] != chat(seed=-2).sampling["seed"]


def test_minus_one_turns_top_k_off_as_other_servers_clients_say_it() -> None:
    assert chat(top_k=-1).sampling["top_k"] == 0
    assert refusal(top_k=-2).param == "top_k"


def test_null_means_not_given() -> None:
    names = ("max_tokens", "temperature", "top_p", "stop", "seed", "stream", "logit_bias", "tools", "n", "user")
    generation = chat(**dict.fromkeys(names))
    assert "max_tokens" not in generation.sampling
    assert generation.sampling["stop"] == ()


def test_max_completion_tokens_beats_max_tokens() -> None:
    assert chat(max_tokens=3, max_completion_tokens=5).sampling["max_tokens"] == 5


def test_one_stop_string_is_a_list_of_one() -> None:
    assert chat(stop="END").sampling["stop"] == ("END",)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "ab"


def test_an_assistant_message_as_the_client_library_returns_it_is_taken_back() -> None:
    echoed = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    assert chat(messages=[echoed]).messages[0] == {"role": "assistant", "content": "x", "name": None}


def test_parameters_that_ask_for_nothing_pass_and_others_are_named() -> None:
    chat(n=1, tools=[], response_format={"type": "text"}, store=False, parallel_tool_calls=True, service_tier="auto")
    for name, value in (("n", 2), ("n", True), ("tools", [{}]), ("response_format", {"type": "json_object"})):
        error = refusal(**{name: value})
        assert (error.code, error.param) == ("unsupported_parameter", name)


def test_a_misspelt_parameter_is_named() -> None:
    error = refusal(temprature=1)
    assert (error.code, error.param) == ("unknown_parameter", "temprature")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids.1"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_the_field_at_fault_is_named(changes: dict[str, Any], param: str) -> None:
    assert refusal(**changes).param == param


def test_options_without_what_they_belong_to_are_refused() -> None:
    assert "stream" in refusal(stream_options={"include_usage": True}).message
    assert "logprobs" in refusal(top_logprobs=2).message


def test_what_a_user_typed_is_not_repeated_in_a_refusal() -> None:
    error = refusal(messages=[{"role": "private words", "content": "more private words"}], temperature=1)
    assert "private" not in error.message
