"""From tokens to text that is safe to show: whole characters only, and nothing that may be the start of a stop string.

Two things are held back. Bytes of an unfinished character wait in the detokenizer; text that a stop
string could begin with waits here. Both come out as soon as they are known to be harmless, or when the sequence ends.
The text is a function of the token sequence alone, so a sequence that is continued elsewhere replays its tokens through
this and goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """An incremental detokenizer, such as ``axon_llm.tokenizer.StreamDetokenizer``."""

    def push(self, token: int) -> str:
        """Take one token and return the text that has become certain; valid UTF-8."""
        ...

    def flush(self) -> str:
        """Return what is left, with unfinished bytes replaced."""
        ...


class StopFinder:
    """Lets text through up to the first stop string.

    The first is the one that is *complete* first (of several complete at once, the longest), which is what a reader of
    single characters would find: the result does not depend on how the text was cut into pieces.

    Args:
        stops: the stop strings, none empty.

    Attributes:
        stopped: a stop string was found; nothing more will come out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text and return what can be shown of everything held so far."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the held text: the sequence is over, so no stop string can be completed any more."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """The text of one completion, token by token.

    Args:
        detokenizer: turns tokens into text; fresh.
        stops: stop strings; the text ends before the first of them.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._finder = StopFinder(stops)

    @property
    def stopped(self) -> bool:
        """A stop string has been completed; the sequence is over."""
        return self._finder.stopped

    def push(self, token: int) -> str:
        """Take one token and return the text it adds for certain; may be empty."""
        return self._finder.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """End the text and return all that was held back, unless it completes a stop string."""
        text = self._finder.push(self._detokenizer.flush())
        return text + self._finder.flush()
