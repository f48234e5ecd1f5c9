"""A mechanical check that a story keeps its names and places: nobody appears from nowhere, nothing is renamed.

A training story has two people and two places. Each person is introduced by "a … named" or "a … called", each place by
"the village of", "the forest of" and so on. A word with a capital letter has to be one of these four, and not before
its introduction; a third person or place is a stranger, introduced or not. People and places do not change roles:
nobody is "in" a person, and no place says anything. At the start of a sentence any word has a capital; there it may
also be one of the words that the training stories begin sentences with.

What it cannot see: one person standing where the other one should, or the first place where the second should.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

from .stories import FAR, PLACES, story
from .templates import unmark
from .words import MONTHS

_HE, _SHE = frozenset("he him his himself".split()), frozenset("she her hers herself".split())
_ALLOWED = frozenset({"I", "Sunday", *MONTHS})
_NOUNS = sorted({phrase.split(" of")[0].split()[-1] for phrase in (*PLACES, *FAR)})
_PERSON = r"\b[Aa]n? (?:[a-z]+ ){1,4}(?:named|called) (?P<name>[A-Z]\w*)"
_PLACE = rf"\b(?P<noun>{'|'.join(_NOUNS)}) of (?P<name>[A-Z]\w*)"
_SENTENCE_START = r'(?:^|[.!?:]"?\s+"?|[,:] "|\n"?|^")'


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        hero: the first person introduced, "" if none was.
        place: the first place introduced, "" if none was.
        strangers: names used without an introduction, before it, or in another's role.
        mentions: how often the hero is named.
        pronouns_agree: until somebody else is introduced, the hero is either "he" or "she" and never both; None where
            no pronoun says which.
    """

    hero: str
    place: str
    strangers: tuple[str, ...]
    mentions: int
    pronouns_agree: bool | None = None

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
    return set(re.findall(_SENTENCE_START + r"([A-Z]\w*)", text))


def check_story(text: str) -> Verdict:
    """Check one story, which may break off in the middle: its last, perhaps incomplete word is left out."""
    text = re.sub(r"\w+$", "", text.strip())
    people, places = _introduced(_PERSON, text), _introduced(_PLACE, text)
    strangers = []
    for match in re.finditer(r"\b[A-Z][a-z]*\b", text):
        word, before, after = match[0], text[: match.start()], text[match.end() :]
        starts = bool(re.search(_SENTENCE_START + "$", before))
        speaks = starts or bool(re.search(r"\b(?:said|asked|thought|shouted|told) $", before))
        holds = bool(re.search(r"\b(?:in|from) $", before)) and not after.startswith("'s")
        noun = re.search(rf"\b({'|'.join(_NOUNS)}) of $", before)
        person, place = people.get(word), places.get(word)
        known = (person and person.start("name") <= match.start() and not holds and not noun) or (
            place and place.start("name") <= match.start() and not speaks and (not noun or noun[1] == place["noun"])
        )
        if not known and word not in _ALLOWED and not (starts and word in _starters()):
            strangers.append(word)
    hero = next(iter(people), "")
    mentions = len(re.findall(rf"\b{re.escape(hero)}\b", text)) if hero else 0
    return Verdict(hero, next(iter(places), ""), tuple(strangers), mentions, _pronouns_agree(text))


def _introduced(pattern: str, text: str) -> dict[str, re.Match[str]]:
    """The first two names that ``pattern`` introduces, in order, and where each of them is first."""
    found: dict[str, re.Match[str]] = {}
    for match in re.finditer(pattern, text):
        if len(found) < 2:
            found.setdefault(match["name"], match)
    return found


def _pronouns_agree(text: str) -> bool | None:
    """Whether one person is meant by all pronouns before a second person turns up, by name or by what they do."""
    alone = re.split(r"\b(?:named|called) [A-Z]\w*", text, maxsplit=2)
    words = set(re.findall(r"[a-z]+", alone[1].lower())) if len(alone) > 1 else set()
    he, she = bool(words & _HE), bool(words & _SHE)
    return not (he and she) if he or she else None
