"""Answers in OpenAI's shapes: token log entries → chunks, completions and usage.

The first chunk of a chat carries the role *and* text; the last text chunk carries the finish reason. Chunks also carry
``sequence``, the number of the log entry they end at: what a client that lost its connection resumes after.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from axon_llm.serving.wire import LogEntry, Terminal, TimingInfo, UsageInfo


class Answer:
    """One completion's identity, and the shapes that repeat it.

    Args:
        job_id: also the completion's ``id``.
        model: as announced.
        created_unix_s: seconds since 1970.
        chat: chat completion, else text completion.
        include_usage: a usage chunk follows the text, and every other chunk says ``"usage": null``.
        resumed: the client has seen the beginning, role included. ``text_offset`` then counts from where it goes on.
    """

    def __init__(
        self,
        job_id: str,
        model: str,
        created_unix_s: float,
        *,
        chat: bool,
        include_usage: bool = False,
        resumed: bool = False,
    ) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._role_sent = resumed
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # bytes of a character that is not whole
        self._length = 0  # characters of the tokens that log-probabilities were told of
        self._identity = {"id": job_id, "created": int(created_unix_s), "model": model}

    def chunk(self, entry: LogEntry) -> dict[str, Any] | None:
        """The chunk for one entry, or ``None`` where there is nothing to tell: text held back, or an error."""
        finish_reason = entry.terminal.finish_reason if entry.terminal else None
        if finish_reason == "error" or not (entry.text or finish_reason or entry.logprob is not None):
            return None
        choice: dict[str, Any] = {"index": 0}
        if self._chat:
            delta = {"content": entry.text}
            if not self._role_sent:
                delta = {"role": "assistant", **delta}
                self._role_sent = True
            choice["delta"] = delta
        else:
            choice["text"] = entry.text
        choice["logprobs"] = self._logprobs([entry])
        choice["finish_reason"] = finish_reason
        chunk = self._object("chat.completion.chunk" if self._chat else "text_completion", [choice])
        if self._include_usage:
            chunk["usage"] = None
        chunk["sequence"] = entry.seq
        return chunk

    def usage_chunk(self, terminal: Terminal) -> dict[str, Any] | None:
        """The chunk after the last, with no choices; ``None`` where it was not asked for or is not known."""
        if not self._include_usage or terminal.usage is None:
            return None
        chunk = self._object("chat.completion.chunk" if self._chat else "text_completion", [])
        return {**chunk, "usage": usage(terminal.usage), **_timings(terminal.timings)}

    def whole(self, entries: Sequence[LogEntry], terminal: Terminal) -> dict[str, Any]:
        """The answer to a request that did not ask for a stream."""
        text = "".join(entry.text for entry in entries)
        choice: dict[str, Any] = {"index": 0}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(entries)
        choice["finish_reason"] = terminal.finish_reason
        answer = self._object("chat.completion" if self._chat else "text_completion", [choice])
        if terminal.usage is not None:
            answer["usage"] = usage(terminal.usage)
        return {**answer, **_timings(terminal.timings)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._identity["id"], "object": kind, **self._identity, "choices": choices}

    def _logprobs(self, entries: Sequence[LogEntry]) -> dict[str, Any] | None:
        scored = [entry for entry in entries if entry.logprob is not None]
        if not scored:
            return None
        if self._chat:
            return {"content": [_chat_logprob(entry) for entry in scored], "refusal": None}
        offsets = []
        for entry in scored:
            offsets.append(self._length)
            self._length += len(self._utf8.decode(bytes(_token_bytes(entry))))
        return {
            "tokens": [_token_text(entry) for entry in scored],
            "token_logprobs": [entry.logprob for entry in scored],
            "top_logprobs": [_alternatives(entry) for entry in scored],
            "text_offset": offsets,
        }


def usage(info: UsageInfo) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": info.prompt_tokens,
        "completion_tokens": info.completion_tokens,
        "total_tokens": info.prompt_tokens + info.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": info.cached_tokens},
    }


def _timings(info: TimingInfo | None) -> dict[str, Any]:
    return {} if info is None else {"timings": info.model_dump(exclude_none=True)}


def _token_text(entry: LogEntry) -> str:
    """The token's own text; what it added to the answer may lag behind."""
    if entry.token_text is not None:
        return entry.token_text
    return next((top.text for top in entry.top_logprobs if top.token == entry.token), entry.text)


def _token_bytes(entry: LogEntry) -> Sequence[int]:
    """What the token adds to the text; several tokens may share one character."""
    return _token_text(entry).encode() if entry.token_bytes is None else entry.token_bytes


def _alternatives(entry: LogEntry) -> dict[str, float]:
    """The most likely texts, and the one that was chosen whether it is among them or not, as OpenAI has it.

    Of tokens with the same text the likeliest counts.
    """
    found: dict[str, float] = {}
    for top in entry.top_logprobs:
        found.setdefault(top.text, top.logprob)
    if entry.logprob is not None:
        found[_token_text(entry)] = max(entry.logprob, found.get(_token_text(entry), entry.logprob))
    return found


def _chat_logprob(entry: LogEntry) -> dict[str, Any]:
    return {
        "token": _token_text(entry),
        "logprob": entry.logprob,
        "bytes": list(_token_bytes(entry)),
        "top_logprobs": [
            {
                "token": top.text,
                "logprob": top.logprob,
                "bytes": list(top.text.encode() if top.bytes is None else top.bytes),
            }
            for top in entry.top_logprobs
        ],
    }
