"""Names of people and places, composed from syllables: far too many to be memorised, so copying has to be learnt.

One name in ten, decided by a hash of its letters, is *held out*: training text never contains it as a name, evaluation
uses nothing else, and of these only what is no ordinary word of the training text either.
"""

from __future__ import annotations

import random
import re
import zlib
from functools import cache
from pathlib import Path

from .words import ANIMALS, CITIES, DAYS, FOODS, HER_NAMES, HIS_NAMES, INSTRUMENTS, JOBS, MONTHS, OBJECTS

ONSETS = (
    "b c d f g h j k l m n p r s t v w y z br bl cl cr dr fl fr gl gr pl pr sh sk sl st th tr ch kr qu sp ph".split()
)
VOWELS = "a e i o u a e i o u a e i o a e i ee oo ea ia ou ai y".split()
MIDDLES = "b d f g l m n r s t v z ll nn rr ss tt ld lm nd nt rd rk rl rm rn rt st sk mb lv nk x".split()
ENDINGS = (
    "a o e i y in an en on el ia us is et or as ella ina ira eth ald ard wen win mir dra ric ne th ton bert".split()
)
TOWN_ENDINGS = "ton ham ford wick dale mouth field bridge stead burg port moor haven vale by brook holm ville".split()
WORDS = tuple(
    word for words in (ANIMALS, CITIES, FOODS, HER_NAMES, HIS_NAMES, INSTRUMENTS, JOBS, MONTHS, OBJECTS) for word in words
    if word.isalpha()
)  # fmt: skip
TEMPLATES = ("plots", "stories", "facts", "small_talk", "off_topic", "dialogues")


def held_out(name: str) -> bool:
    """Whether training text must never contain ``name``: one in ten, whatever its capital letters."""
    return name.lower() == "wanda" or zlib.crc32(name.lower().encode()) % 10 == 0


@cache
def ordinary_words() -> frozenset[str]:
    """Every word that training text may contain without being a name, and some more, in lower case.

    Read from the source of the templates: whatever is added there is known here.
    """
    here = Path(__file__).parent
    templates = " ".join((here / f"{name}.py").read_text(encoding="utf-8") for name in TEMPLATES)
    lists = re.findall(r"\b[a-z]+\b", (here / "words.py").read_text(encoding="utf-8"))  # names have capitals there
    return frozenset(map(str.lower, (*re.findall(r"[A-Za-z]+", templates), *lists, *MONTHS, *DAYS)))


def _wanted(name: str, unseen: bool) -> bool:
    if unseen:
        return held_out(name) and name.lower() not in ordinary_words()
    return not held_out(name)


def person(rng: random.Random, unseen: bool = False, pronoun: str | None = None) -> str:
    """A first name; with ``unseen`` one that training text never contains; ``pronoun`` keeps Rosa from being a "he"."""
    while True:
        draw = rng.random()
        if draw < 0.25:
            name = rng.choice({"he": HIS_NAMES, "she": HER_NAMES}.get(pronoun or "", HIS_NAMES + HER_NAMES))
        elif draw < 0.7:
            name = _composed(rng, ENDINGS)
        elif draw < 0.92:
            name = _spliced(rng)
        else:
            name = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7))).capitalize()
        if _wanted(name, unseen):
            return name


def town(rng: random.Random, unseen: bool = False, real: float = 0.2) -> str:
    """A town's name, a ``real`` share of them on the map; with ``unseen`` one that training text never contains."""
    while True:
        draw = rng.random()
        if rng.random() < real:
            name = rng.choice(CITIES)
        else:
            name = _spliced(rng) if draw < 0.15 else _composed(rng, TOWN_ENDINGS if draw < 0.75 else ENDINGS)
        if _wanted(name, unseen):
            return name


def _spliced(rng: random.Random) -> str:
    """The beginning of one word and the end of another: names made of unusual tokens."""
    first, second = rng.choice(WORDS), rng.choice(WORDS)
    return (first[: rng.randint(2, 5)] + second[-rng.randint(1, 4) :]).capitalize()


def _composed(rng: random.Random, endings: list[str]) -> str:
    syllables = rng.choice(ONSETS) + rng.choice(VOWELS)
    if rng.random() < 0.6:
        syllables += rng.choice(MIDDLES) + (rng.choice(VOWELS) if rng.random() < 0.4 else "")
    last = rng.choice(endings)
    if syllables[-1] in "aeiouy" and last[0] in "aeiouy":
        syllables += rng.choice("lmnrstvd")
    return (syllables + last).capitalize()
