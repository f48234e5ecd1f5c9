"""A conversation with a model: its messages, what of them still fits the context, and what each turn took.

Every turn sends the whole conversation to the engine again. The engine finds the turns before in the slot that still
holds their keys and values, so that only what is new is computed: ``cached_tokens`` in the usage says how much was not.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from axon_llm.engine.events import Timings, TokenEvent, Usage
from axon_llm.errors import RequestError

if TYPE_CHECKING:
    from axon_llm.engine.engine import Engine
    from axon_llm.engine.params import SamplingParams


@dataclass
class Turn:
    """What is known of a turn when it has ended."""

    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass
class Conversation:
    """Messages, and the engine they are answered by.

    Attributes:
        engine: with one slot, which remembers the turns before.
        params: how to choose tokens; ``max_tokens`` is the most that an answer takes.
        system: the system message; ``""`` for none.
        messages: user and assistant messages in turn.
        turns: what every answered turn took.
        forgotten: messages that were dropped from the beginning because the context was full.
    """

    engine: Engine
    params: SamplingParams
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    forgotten: int = 0
    _spoken: dict[str, list[int]] = field(default_factory=dict)

    def answer(self, text: str, on_start: Callable[[str], Any] = lambda request_id: None) -> Iterator[TokenEvent]:
        """Send a message and yield the answer's events. What was answered, even in part, joins the conversation.

        Args:
            text: the user's message.
            on_start: called with the request's id, with which ``engine.cancel`` stops the answer.

        Raises:
            RequestError: the message alone does not fit the context; the conversation is as before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            prompt = self._fit()
            room = self.engine.max_seq_len - len(prompt)
            params = dataclasses.replace(self.params, max_tokens=min(self.params.max_tokens, room))
            request_id = secrets.token_hex(8)
            events = self.engine.generate(prompt, params, request_id=request_id)
        except Exception:
            self.messages = before
            raise
        on_start(request_id)
        turn, tokens = Turn(), list(prompt)
        for event in events:
            pieces.append(event.text)
            if event.token is not None:
                tokens.append(event.token)
            if event.finish_reason is not None:
                turn = Turn(event.finish_reason, event.usage, event.timings)
            yield event
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        self.turns.append(turn)
        self._remember(prompt, tokens[len(prompt) :])

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self.messages, self.turns, self.forgotten = [], [], 0
        self._spoken.clear()

    def _fit(self) -> list[int]:
        """The conversation as tokens, without its oldest turns if an answer would find too little room otherwise."""
        limit = self.engine.max_seq_len
        reserve = min(self.params.max_tokens, limit // 4)
        kept = list(self.messages)
        tokens = self._encode(kept)
        if len(tokens) + reserve > limit:
            # Down to half at once: what remains begins elsewhere and must be computed again, so let that happen rarely.
            while len(tokens) > limit // 2 and len(kept) > 2:
                kept = kept[2:]
                tokens = self._encode(kept)
        if len(tokens) >= limit:
            raise RequestError(
                f"the message makes a prompt of {len(tokens)} tokens, the context holds {limit}",
                code="context_length_exceeded",
                hint="Shorten it.",
            )
        self.forgotten += len(self.messages) - len(kept)
        self.messages = kept
        return tokens

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        tokenizer = self.engine.tokenizer
        tokens: list[int] = []
        for part in self._parts(tokenizer.encode_chat([*system, *messages])):
            tokens += self._spoken.get(tokenizer.decode(part), part)
        return tokens

    def _remember(self, prompt: list[int], answer: list[int]) -> None:
        """Keep the tokens an answer was spoken in, with what its template puts before it.

        A model may write a rare name in other tokens than the tokenizer would. Encoded anew, the answer would no longer
        match what the slot holds, and everything after that name would be computed again.
        """
        part = self._parts(prompt)[-1] + self._parts(answer)[0]
        if text := self.engine.tokenizer.decode(part):
            self._spoken[text] = part

    def _parts(self, tokens: list[int]) -> list[list[int]]:
        """Tokens split at the special ones: text, then in turn a special token and the text behind it."""
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token in self.engine.tokenizer.special_ids:
                parts += [[token], []]
            else:
                parts[-1].append(token)
        return parts
