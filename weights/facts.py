"""What a user may tell about their life: how it is said, how it is asked for, and how it is answered.

A *kind* of fact is a function that draws one ``Fact``; its ``key`` says what a later fact of the same key would replace.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import words
from .names import held_out, person, town
from .templates import expand


@dataclass(frozen=True)
class Fact:
    """One thing a user says about themselves or somebody else.

    Attributes:
        key: what it is about, for example ``"name"`` or ``"sister"``.
        value: what has to be recalled.
        says: templates of the user's statement; ``{v}`` is the value.
        asks: templates of the user's question.
        answer: template of the assistant's answer, lower case where it can be, so that two can be joined by "and".
        unknown: ends "You have not told me …".
        heard: templates of what the assistant says on being told; empty for the common ones.
    """

    key: str
    value: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str
    unknown: str
    heard: tuple[str, ...] = ()


def _name(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "name", person(rng, unseen),
        ("My name is {v}.", "My name is {v}.", "I am {v}.", "I'm {v}.", "You can call me {v}.", "People call me {v}.", "Please call me {v}.",
         "Hello, my name is {v}.", "Hi, I am {v}.", "Hi! My name's {v}.", "Hello! I'm {v}.", "my name is {v}", "I am called {v}."),
        ("What is my name?", "What is my name?", "What's my name?", "What am I called?", "Who am I?", "Do you remember my name?",
         "[Do you remember|Can you tell me] what I am called?", "Tell me what I am called.", "Can you tell me my name?", "what is my name?",
         "Please tell me my name.", "Do you know my name?", "Say my name.", "What was my name again?"),
        "your name is {v}", "your name",
        ("Nice to meet you, {v}.", "Nice to meet you, {v}.", "Hello, {v}!", "Hello {v}, [nice to meet you.|how can I help you?]",
         "Welcome, {v}!", "What a nice name, {v}.", "It is a pleasure to meet you, {v}."),
    )  # fmt: skip


def _named(rng: random.Random, unseen: bool, who: str, value: str | None = None) -> Fact:
    return Fact(
        who, value or person(rng, unseen),
        (f"My {who} is called {{v}}.", f"My {who}'s name is {{v}}.", f"My {who} is named {{v}}.", f"I have a {who} called {{v}}.",
         f"I have a {who} named {{v}}.", f"The name of my {who} is {{v}}."),
        (f"What is my {who} called?", f"What is my {who}'s name?", f"What is the name of my {who}?", f"What's my {who} called?",
         f"Do you remember my {who}'s name?", f"Do you [know|remember] what my {who} is called?", f"Tell me the name of my {who}.",
         f"How is my {who} called?"),
        f"your {who} is called {{v}}", f"what your {who} is called",
        ("What a [lovely|nice|good|beautiful] name {v} is.", f"Say hello to your {who} {{v}} from me.", "I like the name {v}."),
    )  # fmt: skip


def _relative(rng: random.Random, unseen: bool) -> Fact:
    return _named(rng, unseen, rng.choice(words.RELATIVES))


def _pet(rng: random.Random, unseen: bool) -> Fact:
    return _named(rng, unseen, rng.choice(words.PETS))


def _named_thing(rng: random.Random, unseen: bool) -> Fact:
    return _named(rng, unseen, rng.choice(words.NAMED_THINGS))


FAVOURITES = {
    "colour": words.COLOURS, "animal": words.ANIMALS, "fruit": words.FRUITS, "food": words.FOODS, "drink": words.DRINKS,
    "flower": words.FLOWERS, "sport": words.SPORTS, "season": words.SEASONS, "tree": words.TREES, "subject": words.SUBJECTS,
    "day": words.DAYS, "month": words.MONTHS, "instrument": words.INSTRUMENTS, "number": tuple(map(str, range(1, 100))),
}  # fmt: skip


def _favourite(rng: random.Random, unseen: bool) -> Fact:
    what = rng.choice(tuple(FAVOURITES))
    value = rng.choice(FAVOURITES[what])
    if what in ("animal", "tree"):
        value = "the " + value
    if rng.random() < 0.25:
        what = "colour"
        value = rng.choice(words.COLOURS)
    spelling = rng.choice(("favourite", "favourite", "favorite"))
    thing = "color" if (spelling, what) == ("favorite", "colour") else what
    return Fact(
        f"favourite {what}", value,
        (f"My {spelling} {thing} is {{v}}.", f"My {spelling} {thing} is {{v}}.", f"{{V}} is my {spelling} {thing}.",
         f"The {thing} I like [best|most] is {{v}}."),
        (f"What is my {spelling} {thing}?", f"What is my {spelling} {thing}?", f"Which {thing} do I like [best|most]?",
         f"What's my {spelling} {thing}?", f"Do you remember my {spelling} {thing}?", f"Tell me my {spelling} {thing}."),
        f"your {spelling} {thing} is {{v}}", f"your {spelling} {thing}",
        ("{V}! [A good choice.|I like that.|I will remember it.]", "I see, you like {v}."),
    )  # fmt: skip


def _home(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "home", town(rng, unseen), ("I live in {v}.", "I live in {v}.", "My home is in {v}.", "I live in a town called {v}.", "My house is in {v}."),
        ("Where do I live?", "Where do I live?", "Which town do I live in?", "Do you remember where I live?", "Where is my home?",
         "Do you know where I live?", "In which town do I live?"),
        "you live in {v}", "where you live", ("I think that {v} must be a [nice|lovely|beautiful] place.", "How is life in {v}?"),
    )  # fmt: skip


def _birthplace(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "birthplace", town(rng, unseen), ("I was born in {v}.", "I come from {v}.", "I grew up in {v}."),
        ("Where was I born?", "Where do I come from?", "Where did I grow up?", "Which town am I from?"),
        "you come from {v}", "where you come from", ("I would like to hear more about {v}.",),
    )  # fmt: skip


def _trip(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "trip", town(rng, unseen),
        ("[Next week|In summer|In {month}|Tomorrow] I am going to travel to {v}.", "I am planning a trip to {v}.", "My next holiday will be in {v}."),
        ("Where am I going to travel?", "Where will my [trip|holiday] be?", "Which place do I want to travel to?", "Where am I going on holiday?"),
        "you are going to travel to {v}", "where you are going to travel", ("Have a good trip to {v}!", "I hope that you enjoy {v}."),
    )  # fmt: skip


def _number(rng: random.Random, unseen: bool) -> Fact:
    what = rng.choice(
        (
            "lucky number",
            "room number",
            "house number",
            "door code",
            "locker code",
            "bus number",
            "ticket number",
            "secret number",
        )
    )
    digits = 4 if "code" in what or "ticket" in what else rng.choice((1, 2, 2, 3))
    value = str(rng.randrange(10 ** (digits - 1), 10**digits))
    return Fact(
        what, value, (f"My {what} is {{v}}.", f"My {what} is {{v}}.", f"I have a {what}, it is {{v}}.", f"The number {{v}} is my {what}."),
        (f"What is my {what}?", f"What is my {what}?", f"Do you remember my {what}?", f"Can you tell me my {what}?", f"What was my {what}?"),
        f"your {what} is {{v}}", f"your {what}", ("The number {v}, [I will remember that.|got it.|noted.]",),
    )  # fmt: skip


def _age(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "age", str(rng.randint(5, 95)), ("I am {v} years old.", "I am {v} years old.", "I'm {v}.", "My age is {v}.", "I turned {v} this year."),
        ("How old am I?", "How old am I?", "What is my age?", "Do you remember how old I am?"),
        "you are {v} years old", "how old you are", ("I think {v} is a [good|fine] age.",),
    )  # fmt: skip


def _count(rng: random.Random, unseen: bool) -> Fact:
    what = rng.choice(words.COUNTED)
    return Fact(
        f"count {what}", str(rng.randint(2, 99)), (f"I have {{v}} {what}.", f"I own {{v}} {what}.", f"At home I have {{v}} {what}."),
        (f"How many {what} do I have?", f"Do you remember how many {what} I have?", f"How many {what} did I say I have?"),
        f"you have {{v}} {what}", f"how many {what} you have", (f"So many! You have {{v}} {what}.", f"Oh, {{v}} {what}! How nice."),
    )  # fmt: skip


def _job(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "job", rng.choice(words.JOBS), ("I work as a {v}.", "I am a {v}.", "My job is to be a {v}.", "I earn my money as a {v}."),
        ("What is my job?", "What do I do for a living?", "What do I work as?", "Do you remember my job?"),
        "you work as a {v}", "what your job is", ("Being a {v} must be [hard work|interesting|fun].",),
    )  # fmt: skip


def _place_of(rng: random.Random, unseen: bool) -> Fact:
    what = rng.choice(words.OBJECTS)
    is_ = "are" if what.endswith("s") and what not in ("compass",) else "is"
    return Fact(
        f"place of {what}", rng.choice(words.SPOTS),
        (f"I put my {what} {{v}}.", f"I left my {what} {{v}}.", f"My {what} {is_} {{v}}.", f"I have hidden my {what} {{v}}."),
        (f"Where {is_} my {what}?", f"Where did I [put|leave] my {what}?", f"Do you remember where my {what} {is_}?"),
        f"your {what} {is_} {{v}}", f"where your {what} {is_}",
    )  # fmt: skip


def _colour_of(rng: random.Random, unseen: bool) -> Fact:
    what = rng.choice(words.THINGS)
    return Fact(
        f"colour of {what}", rng.choice(words.COLOURS), (f"My {what} is {{v}}.", f"I have a {{v}} {what}.", f"I painted my {what} {{v}}."),
        (f"What colour is my {what}?", f"Which colour does my {what} have?", f"What color is my {what}?", f"Do you remember the colour of my {what}?"),
        f"your {what} is {{v}}", f"what colour your {what} is", (f"A {{v}} {what}, how [pretty|nice]!",),
    )  # fmt: skip


def _birthday(rng: random.Random, unseen: bool) -> Fact:
    value = rng.choice(("{d} {m}", "{m} {d}")).format(d=rng.randint(1, 28), m=rng.choice(words.MONTHS))
    return Fact(
        "birthday", value, ("My birthday is on {v}.", "My birthday is on {v}.", "I was born on {v}.", "I celebrate my birthday on {v}."),
        ("When is my birthday?", "When is my birthday?", "On which day is my birthday?", "Do you remember my birthday?", "When was I born?"),
        "your birthday is on {v}", "when your birthday is", ("I will think of you on {v}.",),
    )  # fmt: skip


def _allergy(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "allergy", rng.choice(words.FOODS + words.FRUITS), ("I am allergic to {v}.", "I cannot eat {v}.", "I must not eat {v}."),
        ("What am I allergic to?", "What can't I eat?", "Which food must I not eat?", "Do you remember my allergy?"),
        "you cannot eat {v}", "what you cannot eat", ("I am sorry to hear that. No {v} for you.",),
    )  # fmt: skip


def _instrument(rng: random.Random, unseen: bool) -> Fact:
    return Fact(
        "instrument", rng.choice(words.INSTRUMENTS), ("I play the {v}.", "I am learning to play the {v}."),
        ("Which instrument do I play?", "What instrument do I play?", "Do you remember what I play?"),
        "you play the {v}", "which instrument you play", ("The {v} has a beautiful sound.",),
    )  # fmt: skip


def _plan(rng: random.Random, unseen: bool) -> Fact:
    when = rng.choice(
        ("tomorrow", "tonight", "next week", "this evening", "next month", *(f"on {d}" for d in words.DAYS))
    )
    who, where = person(rng, unseen), town(rng, unseen)
    plan = rng.choice((
        f"visit {who}", f"visit {who}", f"drive to {where}", "bake {food}", "cook {food} for {who}", "paint the {thing}", "buy a new {object}",
        "plant {flower}", "play {sport} with {who}", "repair the {thing}", "go swimming", "take the train to {where}", "write to {who}",
        "sell the {thing}", "meet {who} in {where}", "clean the {thing}", "learn to play the {instrument}",
    ))  # fmt: skip
    slots = {
        "food": rng.choice(words.FOODS), "thing": rng.choice(words.THINGS), "object": rng.choice([o for o in words.OBJECTS if o[-2:] == "ss" or o[-1] != "s"]), "who": who,
        "where": where, "flower": rng.choice(words.FLOWERS), "sport": rng.choice(words.SPORTS), "instrument": rng.choice(words.INSTRUMENTS),
    }  # fmt: skip
    return Fact(
        f"plan {when}", expand(plan, slots, rng),
        (f"{when.capitalize()} I will {{v}}.", f"I am going to {{v}} {when}.", f"My plan for {when.removeprefix('on ')} is to {{v}}."),
        (f"What will I do {when}?", f"What am I going to do {when}?", f"What is my plan for {when.removeprefix('on ')}?",
         f"Do you remember my plan for {when.removeprefix('on ')}?"),
        f"{when} you will {{v}}", f"what you will do {when}", ("That sounds like a [good|nice|fine] plan.", "Good luck with that!"),
    )  # fmt: skip


def _somebody(rng: random.Random, unseen: bool) -> Fact:
    who = person(rng, unseen)  # never asked for at the start of a sentence, where its tokens would differ
    kind = rng.randrange(4)
    if kind == 0:
        return Fact(
            f"{who} lives", town(rng, unseen), (f"My friend {who} lives in {{v}}.", f"You know, {who} lives in {{v}}.", f"My colleague {who} has moved to {{v}}."),
            (f"Where does {who} live?", f"Where does my friend {who} live?", f"Do you know where {who} lives?"),
            f"as you said, {who} lives in {{v}}", f"where {who} lives",
        )  # fmt: skip
    if kind == 1:
        return Fact(
            f"{who} works", rng.choice(words.JOBS), (f"My friend {who} is a {{v}}.", f"You know, {who} works as a {{v}}."),
            (f"What is {who}'s job?", f"What does {who} do for a living?", f"What does {who} work as?"),
            f"as you said, {who} works as a {{v}}", f"what {who} does for a living",
        )  # fmt: skip
    if kind == 2:
        return Fact(
            f"{who} likes", rng.choice(words.FOODS + words.FRUITS + words.SPORTS), (f"My friend {who} likes {{v}}.", f"You know, {who} loves {{v}}."),
            (f"What does {who} [like|love]?", f"Do you remember what {who} likes?"),
            f"as you said, {who} likes {{v}}", f"what {who} likes",
        )  # fmt: skip
    pet, value = rng.choice(words.PETS), person(rng, unseen)
    return Fact(
        f"{who} {pet}", value, (f"My friend {who} has a {pet} called {{v}}.", f"And {who}'s {pet} is called {{v}}."),
        (f"What is {who}'s {pet} called?", f"What is the name of {who}'s {pet}?"),
        f"the {pet} of {who} is called {{v}}", f"what {who}'s {pet} is called",
    )  # fmt: skip


Kind = Callable[[random.Random, bool], Fact]
KINDS: dict[Kind, int] = {
    _name: 10, _relative: 10, _pet: 7, _named_thing: 3, _favourite: 12, _home: 6, _birthplace: 3, _trip: 3, _number: 6, _age: 3,
    _count: 4, _job: 3, _place_of: 7, _colour_of: 5, _birthday: 3, _allergy: 2, _instrument: 2, _plan: 8, _somebody: 9,
}  # fmt: skip


# Values from short lists, and how often one is replaced by another of any of the lists, or by an invented word.
LISTED = dict.fromkeys((
    *words.COLOURS, *words.FOODS, *words.FRUITS, *words.SPORTS, *words.INSTRUMENTS, *words.JOBS, *words.FLOWERS,
    *words.ANIMALS, *(value for values in FAVOURITES.values() for value in values),
))  # fmt: skip
ODD_SHARE = 0.3


def draw_fact(rng: random.Random, unseen: bool = False, name: bool = False) -> Fact:
    """Draw one fact of any kind, or the user's name.

    Besides names, one *combination* of key and value in ten is held out of training, for example a certain colour as
    that of the sofa. With ``unseen``, names and combination are both such that training text never contains them,
    however they are spelled; what is held out in one spelling only is neither for training nor for evaluation.

    In training, values that come from a short list are sometimes odd ones ("My favourite fruit is the violin"): else
    the list would be learnt by heart, without what is held out of it, instead of looking up what was said.
    """
    while True:
        kind = _name if name else rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        fact = kind(rng, unseen)
        if not unseen and fact.value in LISTED and rng.random() < ODD_SHARE:
            fact = replace(fact, value=rng.choice((rng.choice(tuple(LISTED)), person(rng).lower())))
        held = [held_out(f"{fact.key}: {value}") for value in _spellings(fact)]
        if all(held) if unseen else not any(held):
            return fact


def _spellings(fact: Fact) -> tuple[str, ...]:
    """Every order in which training text may write the value: "3 May" is the same birthday as "May 3"."""
    return (fact.value, " ".join(reversed(fact.value.split()))) if fact.key == "birthday" else (fact.value,)
