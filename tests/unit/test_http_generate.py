"""What the session manager refuses before there is a job, and whose sampling parameters a job has."""

from __future__ import annotations

from typing import Any

import pytest

from axon_llm.serving.http_errors import ApiError
from axon_llm.serving.http_generate import check_fits
from axon_llm.serving.openai_requests import read_generation
from axon_llm.serving.wire import ModelCard

CARD = ModelCard(id="m", created_unix_s=0, max_seq_len=64, vocab_size=100, has_chat_template=False)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "no_chat_template", "messages"),
        ({"prompt": [1, 2, 100]}, "invalid_value", "prompt"),
        ({"prompt": "hi", "stop_token_ids": [100]}, "invalid_value", "stop_token_ids"),
        ({"prompt": "hi", "logit_bias": {"100": 1}}, "invalid_value", "logit_bias"),
        ({"prompt": "hi", "max_tokens": 64}, "context_length_exceeded", "max_tokens"),
        ({"prompt": [1] * 64, "max_tokens": 1}, "context_length_exceeded", "prompt"),
    ],
)
def test_what_can_be_seen_not_to_fit_the_model_is_refused_by_name(body: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_fits(read_generation({"model": "m", **body}, chat="messages" in body), CARD)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, param)


def test_what_fits_is_let_through() -> None:
    check_fits(read_generation({"model": "m", "prompt": [0, 99], "max_tokens": 62}, chat=False), CARD)
