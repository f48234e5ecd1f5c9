"""Drafting the next tokens from the sequence's own past (prompt-lookup decoding, Saxena, 2023).

Summaries, edits and code repeat what they were given. So: find the last place where the sequence's newest few tokens
occurred before, and draft what followed then. No second model, a dictionary look-up per token. The drafts are worth
nothing by themselves; ``speculate.py`` has the target model verify them all in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable


class PromptLookup:
    """The n-grams of one growing sequence and where each was last seen.

    Args:
        tokens: the sequence so far.
        longest: the longest match that is tried.
        shortest: the shortest match that is believed; below it, nothing is drafted.
    """

    def __init__(self, tokens: Iterable[int] = (), *, longest: int = 4, shortest: int = 2) -> None:
        self.tokens: list[int] = []
        self._sizes = range(longest, shortest - 1, -1)
        # n-gram → index of the token after its latest occurrence that already has a token after it
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the next token: the n-grams that ended just before it now have a continuation."""
        end = len(self.tokens)
        for size in self._sizes:
            if size <= end:
                self._after[tuple(self.tokens[end - size : end])] = end
        self.tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to ``count`` tokens that followed the latest earlier occurrence of the newest n-gram, longest n first.

        Where the earlier occurrence runs into the present (a loop), the draft goes on through its own tokens.
        """
        end = len(self.tokens)
        for size in self._sizes:
            start = self._after.get(tuple(self.tokens[end - size :])) if size <= end else None
            if start is not None:
                period = end - start
                return [self.tokens[start + i % period] for i in range(count)]
        return []
