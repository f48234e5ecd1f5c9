"""What a request asks of the sampler and when to stop. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from axon_llm.errors import RequestError

LARGEST_BIAS = 1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, and when to stop choosing.

    Attributes:
        max_tokens: at most this many new tokens, at least 1.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the most likely tokens that hold this much probability together; 1 keeps all.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides (if negative, multiplies) the logits of tokens in prompt or completion, at least
            0.01; 1 is none.
        presence_penalty: subtracted from the logit of every token that is in the completion.
        frequency_penalty: subtracted once for every time a token is in the completion.
        logit_bias: added to the logits of these token ids; at most 10,000 either way, so that logits stay numbers.
        stop: the text ends before the first of these strings; it is not part of the output.
        stop_token_ids: tokens that end the sequence, besides the model's own.
        ignore_eos: go on after the model's end-of-sequence tokens (for measurements).
        logprobs: report log-probabilities, of each token and of this many likeliest alternatives; ``None`` for neither.
        seed: the random numbers depend on this and the position alone; ``None`` lets the engine draw one.

    Raises:
        RequestError: a value is outside its range; ``param`` names it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check every value against its range."""
        self._integer("max_tokens", 1, 2**31 - 1)
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0, above=True)
        self._integer("top_k", 0, 2**31 - 1)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.01, 100.0)
        self._number("presence_penalty", -100.0, 100.0)
        self._number("frequency_penalty", -100.0, 100.0)
        if self.logprobs is not None:
            self._integer("logprobs", 0, 20)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1)
        if isinstance(self.stop, str):
            raise RequestError("stop must be a sequence of strings", code="invalid_value", param="stop")
        if any(not text for text in self.stop):
            raise RequestError("a stop string must not be empty", code="invalid_value", param="stop")
        if not all(abs(bias) <= LARGEST_BIAS for bias in self.logit_bias.values()):
            raise RequestError(
                f"logit_bias must be numbers from {-LARGEST_BIAS:g} to {LARGEST_BIAS:g}",
                code="invalid_value",
                param="logit_bias",
            )

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RequestError(
                f"{name} must be an integer from {low} to {high}, not {value!r}", code="invalid_value", param=name
            )

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not (low < value if above else low <= value) or not value <= high:
            bracket = "(" if above else "["
            raise RequestError(
                f"{name} must be a number in {bracket}{low:g}, {high:g}], not {value!r}",
                code="invalid_value",
                param=name,
            )
