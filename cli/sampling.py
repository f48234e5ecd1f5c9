"""The sampling options of a command: looked at before a model is loaded, completed with its recommendations after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from axon_llm.engine.params import SamplingParams

if TYPE_CHECKING:
    from axon_llm.tokenizer import Tokenizer


def given(max_tokens: int, stop: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """Arguments of ``SamplingParams``: the options that were given, without those that are ``None``.

    Raises:
        RequestError: a value is out of range.
    """
    named = {name: value for name, value in options.items() if value is not None}
    found = {"max_tokens": max_tokens, "stop": tuple(stop or ()), **named}
    SamplingParams(**found)
    return found


def sampling(tokenizer: Tokenizer, found: Mapping[str, Any]) -> SamplingParams:
    """What was given, else what the checkpoint's authors recommend, else the defaults.

    Raises:
        RequestError: a recommended value is out of range.
    """
    return SamplingParams(**{**tokenizer.generation_defaults, **found})
