"""Speculation: draft several tokens, let the model verify all of them in one pass, keep those it would have chosen.

A decode step is bound by reading the weights, so running eight tokens through the model costs little more than one.
``Drafter`` drafts what comes next from the sequence's own past; the engine runs the newest token and the drafts
together, then chooses a token at each position exactly as it would have without drafts: same logits, same filters,
same random number of (seed, position). As long as the choice is the draft, the next position's logits are valid too,
and several tokens come out of one pass. The first choice that differs is kept as well, since it is what the model
says; what was drafted after it is forgotten.

So no answer changes, greedy or sampled: speculation decides when tokens are computed, never which (compare Leviathan
et al., 2023, where the distribution is kept and the tokens are not). That holds as far as several rows have the logits
that one row would have had: on a GPU, other kernels add in another order, and two tokens nearly equally likely may
change places.

Rejected drafts cost time. After them, drafting pauses, longer each time, until enough are accepted again.

Read next: ``prompt_lookup.py`` (where drafts come from), ``iteration.py`` (how they are verified).
"""

from __future__ import annotations

from collections.abc import Sequence

from axon_llm.engine.prompt_lookup import PromptLookup

LONGEST_PAUSE = 64
DEFAULT_DRAFTS = 7  # with the newest token eight rows, which matrix units handle as one tile


class Drafter:
    """Drafts for one sequence, and how far to trust them.

    Args:
        tokens: the sequence so far.
        max_drafts: drafts per pass at most.
    """

    def __init__(self, tokens: Sequence[int], max_drafts: int) -> None:
        self._lookup = PromptLookup(tokens)
        self._max_drafts = max_drafts
        self._pause, self._wait = 1, 0

    def draft(self, tokens: Sequence[int], room: int) -> list[int]:
        """Draft what follows ``tokens``: at most ``room`` tokens, or none for now.

        Args:
            tokens: the sequence; it begins with what this drafter was given before.
            room: how many tokens may follow.
        """
        for token in tokens[len(self._lookup.tokens) :]:
            self._lookup.append(token)
        if self._wait:
            self._wait -= 1
            return []
        return self._lookup.draft(min(self._max_drafts, room))

    def record(self, drafted: int, accepted: int) -> None:
        """Take note that of ``drafted`` tokens the first ``accepted`` were chosen."""
        if accepted * 4 >= drafted:
            self._pause = 1
        else:
            self._wait, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
