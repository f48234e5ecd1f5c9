"""Speculation: guess several tokens, let the model check all of them in one pass, keep those it would have chosen.

A decode step is bound by reading the weights, so running eight tokens through the model costs little more than one.
``Guesser`` guesses what comes next from the sequence's own past; the engine runs the newest token and the guesses
together, then chooses a token at each position exactly as it would have without guesses: same logits, same filters,
same random number of (seed, position). As long as the choice is the guess, the next position's logits are valid too,
and several tokens come out of one pass. The first choice that differs is kept as well, since it is what the model
says; what was guessed after it is forgotten.

So no answer changes, greedy or sampled: speculation decides when tokens are computed, never which (compare Leviathan
et al., 2023, where the distribution is kept and the tokens are not).

Wrong guesses cost time. After one, guessing pauses, longer each time, until it is right again.

Read next: ``prompt_lookup.py`` (where guesses come from), ``iteration.py`` (how they are checked).
"""

from __future__ import annotations

from collections.abc import Sequence

from axon_llm.engine.prompt_lookup import PromptLookup

LONGEST_PAUSE = 64
DEFAULT_GUESSES = 7  # with the newest token eight rows, which matrix units handle as one tile


class Guesser:
    """Guesses for one sequence, and how far to trust them.

    Args:
        tokens: the sequence so far.
        count: guesses per pass at most.
    """

    def __init__(self, tokens: Sequence[int], count: int) -> None:
        self._lookup = PromptLookup(tokens)
        self._count = count
        self._pause, self._wait = 1, 0

    def guess(self, tokens: Sequence[int], room: int) -> list[int]:
        """Guess what follows ``tokens``: at most ``room`` tokens, or none for now.

        Args:
            tokens: the sequence; it begins with what this guesser has seen before.
            room: how many tokens may follow.
        """
        for token in tokens[len(self._lookup.tokens) :]:
            self._lookup.append(token)
        if self._wait:
            self._wait -= 1
            return []
        return self._lookup.guess(min(self._count, room))

    def learn(self, guessed: int, right: int) -> None:
        """Take note that of ``guessed`` tokens the first ``right`` were chosen."""
        if right * 4 >= guessed:
            self._pause = 1
        else:
            self._wait, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
