"""Short stories whose people, places and things stay the same from the first sentence to the last."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from .names import person, town
from .plots import ENDINGS, FRIENDS, HABITS, OPENINGS, PLOTS
from .templates import expand, mark
from .words import ANIMALS, COLOURS, FOODS, JOBS, OBJECTS, SEASONS, SPOTS

TRAITS = (
    "kind brave clever curious shy cheerful gentle quiet lively lonely friendly proud patient little young hungry honest "
    "careful lazy funny tiny dreamy helpful polite stubborn merry wise generous busy"
).split()
HOMES = (
    "a small house|a little cottage|a tall tower|a cosy den|a {colour} house|an old mill|a house with a {colour} door|"
    "a hut by the river|a room above the bakery|a hollow tree|a house on the hill|a wooden cabin|a crooked house"
).split("|")
PLACES = (
    "the village of|the town of|the old town of|the valley of|the city of|the harbour of|the green land of|"
    "the little village of|the quiet town of"
).split("|")
FAR = (
    "the mountains of {name}|the land of {name}|the forest of {name}|the castle of {name}|the hills of {name}|the caves of {name}|"
    "the city of {name}|the island of {name}|the market of {name}|the tower of {name}|the ruins of {name}"
).split("|")
SINGLE_THINGS = tuple(thing for thing in OBJECTS if thing.endswith("ss") or not thing.endswith("s"))
BEASTS = tuple(animal for animal in ANIMALS if animal not in ("kitten", "puppy", "lamb"))  # "an old puppy"
BOYISH, GIRLISH = ("boy", "king", "prince", "old man"), ("girl", "queen", "princess", "old woman")


@dataclass(frozen=True)
class Story:
    """A story and the names in it.

    Attributes:
        text: plain text, with the recurring names between marks (``templates.py``).
        hero: the main character.
        friend: the second one.
        town: where they live.
        kind: what the hero is, for example ``"fox"``.
    """

    text: str
    hero: str
    friend: str
    town: str
    kind: str


def story(rng: random.Random, *, kind: str | None = None, unseen: bool = False, max_beats: int = 99) -> Story:
    """Write one story.

    Args:
        rng: source of every choice.
        kind: make the hero this kind of animal or person.
        unseen: use only names that training text never contains.
        max_beats: stop the plot after so many beats, for a short story.
    """
    hero_kind, he = _character(rng, kind)
    friend_kind, fhe = _character(rng, None)
    hero = person(rng, unseen, he)
    names = (hero, _other_than(hero, lambda: person(rng, unseen, fhe)))
    home_town = town(rng, unseen, real=0.0)
    places = (home_town, _other_than(home_town, lambda: town(rng, unseen, real=0.0)))
    slots = {
        "hero": names[0], "friend": names[1], "town": places[0], "kind": hero_kind, "fkind": friend_kind,
        "trait": rng.choice(TRAITS), "ftrait": rng.choice(TRAITS), "place": rng.choice(PLACES), "home": rng.choice(HOMES),
        "far": rng.choice(FAR).replace("{name}", places[1]), "thing": rng.choice(SINGLE_THINGS),
        "food": rng.choice(FOODS), "spot": rng.choice(SPOTS), "colour": rng.choice(COLOURS), "beast": rng.choice(BEASTS),
        "season": rng.choice(SEASONS), "royal": rng.choice(("king", "queen")),
    }  # fmt: skip
    for prefix, subject in (("", he), ("f", fhe)):
        forms = ("he", "him", "his", "himself") if subject == "he" else ("she", "her", "her", "herself")
        slots.update(zip((prefix + form for form in ("he", "him", "his", "himself")), forms, strict=True))
    weights = (6, 6, 6, 2, 2, 1, 2, 1)
    beats = rng.choices(OPENINGS, weights)
    beats += [*rng.sample(HABITS, rng.choice((0, 1, 1, 2))), rng.choice(FRIENDS)]
    beats += rng.choice(PLOTS)[:max_beats]
    beats += rng.sample(ENDINGS, rng.choice((1, 1, 2)))
    text = ""
    for beat in beats:
        sentence = expand(beat, slots, rng)
        # A name after a line break would be other tokens than the same name after a space, so none begins a paragraph.
        text += ("\n\n" if text and not sentence.startswith(names) and rng.random() < 0.3 else " ") + sentence
    text = text.strip()
    return Story(_mark_repeats(text, (*names, *places)), names[0], names[1], places[0], hero_kind)


def _other_than(taken: str, draw: Callable[[], str]) -> str:
    while (name := draw()) == taken:
        pass
    return name


def _character(rng: random.Random, kind: str | None) -> tuple[str, str]:
    if kind is None:
        draw = rng.random()
        pool = ANIMALS if draw < 0.45 else JOBS if draw < 0.7 else BOYISH if draw < 0.85 else GIRLISH
        kind = rng.choice(pool)
    if kind in BOYISH or kind in GIRLISH:
        return kind, "he" if kind in BOYISH else "she"
    return kind, rng.choice(("he", "she"))


def _mark_repeats(text: str, names: tuple[str, ...]) -> str:
    """Mark every mention of a name after its first: from there on it is recalled, no longer invented."""
    seen: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        name = match[0]
        if name in seen:
            return mark(name)
        seen.add(name)
        return name

    return re.sub(r"\b(" + "|".join(map(re.escape, names)) + r")\b", replace, text)
