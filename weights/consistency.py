"""A mechanical check that a story keeps its names and places: no name turns up that was not introduced.

Every person is introduced by "named" or "called", every place by "of" ("the village of …"). After that, a word with a
capital letter inside a sentence has to be one of those. At the start of a sentence any word has a capital; there it has
to be one of the words that the training stories begin sentences with.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

from .stories import story
from .templates import unmark
from .words import MONTHS

_HE, _SHE = frozenset("he him his himself".split()), frozenset("she her hers herself".split())
_ALLOWED = frozenset({"I", "Sunday", *MONTHS})


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        hero: the first person introduced, "" if none was.
        place: the first place introduced, "" if none was.
        strangers: names used without an introduction.
        mentions: how often the hero is named.
        pronouns_agree: until somebody else is introduced, the hero is either "he" or "she" and never both.
    """

    hero: str
    place: str
    strangers: tuple[str, ...]
    mentions: int
    pronouns_agree: bool = True

    @property
    def consistent(self) -> bool:
        """There is a hero and a place, the hero comes again, and nobody appears from nowhere."""
        return bool(self.hero) and bool(self.place) and self.mentions >= 2 and not self.strangers


@cache
def _starters() -> frozenset[str]:
    """Words that the generator itself begins sentences with."""
    rng, found = random.Random("starters"), set()
    for _ in range(3000):
        told = story(rng)
        text = unmark(told.text)[0]
        names = {word for name in (told.hero, told.friend, told.town) for word in name.split()}
        found |= {word for word in _sentence_starts(text) if word not in names}
    return frozenset(found)


def _sentence_starts(text: str) -> set[str]:
    return set(re.findall(r'(?:^|[.!?:]"?\s+"?|[,:] "|\n"?|^")([A-Z]\w*)', text))


def check_story(text: str) -> Verdict:
    """Check one story, which may break off in the middle: its last, perhaps incomplete word is left out."""
    text = re.sub(r"\w+$", "", text.strip())
    people = re.findall(r"\b(?:named|called) ([A-Z]\w*)", text)
    places = re.findall(r"\bof ([A-Z]\w*)", text)
    introduced = set(people) | set(places)
    strangers = []
    for match in re.finditer(r"\b[A-Z][a-z]*\b", text):
        word, before = match[0], text[: match.start()]
        starts = bool(re.search(r'(?:^|[.!?:]"?\s+"?|[,:] "|\n"?|^")$', before))
        if word not in introduced and word not in _ALLOWED and not (starts and word in _starters()):
            strangers.append(word)
    hero = people[0] if people else ""
    mentions = len(re.findall(rf"\b{re.escape(hero)}\b", text)) if hero else 0
    return Verdict(hero, places[0] if places else "", tuple(strangers), mentions, _pronouns_agree(text))


def _pronouns_agree(text: str) -> bool:
    """Whether one person is meant by all pronouns before a second person turns up, by name or by what they do."""
    alone = re.split(r"\b(?:named|called) [A-Z]\w*", text, maxsplit=2)
    words = set(re.findall(r"[a-z]+", alone[1].lower())) if len(alone) > 1 else set()
    return not (words & _HE and words & _SHE)
