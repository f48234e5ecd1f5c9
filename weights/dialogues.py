"""Conversations in which a user tells facts, talks of other things, and later asks for the facts.

They are written in the chat format of ``chat_template.jinja``: ``render`` here and that template give the same text,
token for token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from . import words
from .facts import Fact, draw_fact
from .names import person
from .small_talk import small_talk
from .stories import story
from .templates import capital, expand, mark

BOS, EOS, START, END = "<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = (
    "You are a helpful assistant.", "You are a friendly assistant.", "You are Axon, a small language model.", "Answer briefly.",
    "You are a kind assistant who remembers what the user says.", "Be polite and answer in one sentence.",
)  # fmt: skip
HEARD = (
    "[I will remember that|I will keep that in mind|Noted|Thank you for telling me|Good to know|I see|All right|Got it]{you}.",
)
STORY_WISHES = (
    "Tell me a story.",
    "[Please tell|Can you tell] me a story[.|, please.]",
    "I would like to hear a story.",
    "Tell me a short story.",
)

Message = dict[str, str]


@dataclass
class Conversation:
    """A conversation under construction.

    Attributes:
        rng: source of every choice.
        unseen: use only names that training text never contains.
        messages: what was said, in order; recalled values stand between marks (``templates.py``).
        facts: what the user has told, the newest of each key; the one mentioned longest ago comes first.
        kept_back: keys of facts that nobody mentions for now, so that they come to be asked for from far away.
    """

    rng: random.Random
    unseen: bool = False
    messages: list[Message] = field(default_factory=list)
    facts: dict[str, Fact] = field(default_factory=dict)
    kept_back: frozenset[str] = frozenset()

    @property
    def name(self) -> str | None:
        """The user's name, if it was told and may be mentioned."""
        return self.facts["name"].value if "name" in self.facts and "name" not in self.kept_back else None

    @property
    def length(self) -> int:
        """Characters so far, the marks of the chat format included."""
        return sum(len(message["content"]) + 25 for message in self.messages)

    def exchange(self, user: str, assistant: str) -> None:
        """Add what the user says and what the assistant answers."""
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

    def tell(self, *facts: Fact) -> None:
        """The user states facts, joined into one message; the assistant takes note of them."""
        said, rng = [], self.rng
        for fact in facts:
            says = _fill(rng.choice(fact.says), fact.value, rng)
            if said and rng.random() < 0.4 and said[-1][-1] == "." and says.startswith(("My ", "I ")):
                said[-1] = said[-1][:-1]
                says = "and " + (says if says.startswith("I ") else "m" + says[1:])
            said.append(says)
            self.facts.pop(fact.key, None)
            self.facts[fact.key] = fact
        answer = self._heard(rng.choice(facts))
        self.exchange(" ".join(said), answer)

    def news(self, name: bool = False) -> Fact:
        """A fact to tell; now and then it replaces one told before."""
        fact = draw_fact(self.rng, self.unseen, name)
        while fact.key in self.kept_back or (fact.key in self.facts and self.rng.random() < 0.9):
            fact = draw_fact(self.rng, self.unseen)
        return fact

    def _heard(self, fact: Fact) -> str:
        rng, value = self.rng, mark(fact.value)
        draw = rng.random()
        if draw < 0.4 or fact.key == "name":
            pool = fact.heard or HEARD
            you = f", {mark(self.name)}" if self.name and rng.random() < 0.25 else ""
            return expand(rng.choice(pool), {"v": value, "you": you}, rng)
        if draw < 0.7:
            opening = rng.choice(("I will remember that", "So", "I see,", "Good to know that", "Noted:"))
            return f"{opening} {_fill(fact.answer, value, rng)}."
        you = f", {mark(self.name)}" if self.name and rng.random() < 0.25 else ""
        return expand(rng.choice(HEARD), {"you": you}, rng)

    def ask(self, *facts: Fact) -> None:
        """The user asks for one or two facts told before."""
        rng = self.rng
        for fact in facts:
            self.facts[fact.key] = self.facts.pop(fact.key)
        first = _fill(rng.choice(facts[0].asks), facts[0].value, rng)
        answers = [_fill(fact.answer, mark(fact.value), rng) for fact in facts]
        if len(facts) == 2:
            second = _fill(rng.choice(facts[1].asks), facts[1].value, rng)
            joined = first[:-1] + " and " + second[0].lower() + second[1:] if first[-1] == "?" else f"{first} {second}"
            self.exchange(joined, capital(" and ".join(answers)) + ".")
            return
        if rng.random() < 0.06:
            first = first[0].lower() + first[1:]
        if rng.random() < 0.06:
            first = first[:-1]
        answer = capital(answers[0]) + "."
        if rng.random() < 0.08:
            answer = rng.choice(("Yes, ", "Of course, ", "You told me that ")) + answers[0] + "."
        self.exchange(first, answer)

    def ask_unknown(self) -> None:
        """The user asks for something never told."""
        rng = self.rng
        fact = draw_fact(rng, self.unseen, name=rng.random() < 0.15)
        if fact.key not in self.facts:
            self.exchange(_fill(rng.choice(fact.asks), fact.value, rng), f"You have not told me {fact.unknown}.")

    def chat(self) -> None:
        """One exchange about something else."""
        self.exchange(*small_talk(self.rng, self.name, self.unseen))

    def hear_story(self) -> None:
        """The assistant tells a story; the user may ask what was in it."""
        rng = self.rng
        kind = rng.choice(words.ANIMALS) if rng.random() < 0.5 else None
        told = story(rng, kind=kind, unseen=self.unseen, max_beats=rng.choice((1, 2, 3, 8)))
        wish = rng.choice(STORY_WISHES) if kind is None else f"[Tell me|Please tell me|I want] a story about a {kind}."
        self.exchange(expand(wish, {}, rng), told.text)
        hero = mark(told.hero)
        if rng.random() < 0.5:
            self.exchange(*rng.choice((
                ("Who was the story about?", f"The story was about {hero}."),
                (f"What was the {told.kind} called?", f"The {told.kind} was called {hero}."),
                ("Where did the story happen?", f"It happened in {mark(told.town)}."),
                (f"Where did {told.hero} live?", f"I said that {hero} lived in {mark(told.town)}."),
                (f"Who was the friend of {told.hero}?", f"The friend of {hero} was {mark(told.friend)}."),
            )))  # fmt: skip

    def repeat_list(self) -> None:
        """The user gives a list to remember and wants it back, at once or after a word on something else."""
        rng = self.rng
        pool = rng.choice((words.FOODS, words.ANIMALS, words.COLOURS, words.OBJECTS, None))
        count = rng.randint(2, 7)
        items = rng.sample(pool, count) if pool else [person(rng, self.unseen) for _ in range(count)]
        given, back = ", ".join(items), ", ".join(map(mark, items))
        if rng.random() < 0.5:
            self.exchange(expand("[Repeat after me|Say|Repeat]: ", {}, rng) + given + ".", f"You said: {back}.")
            return
        self.exchange(
            expand("[Remember this list|My list is|Please remember these words]: ", {}, rng) + given + ".",
            "I will remember your list.",
        )
        if rng.random() < 0.4:
            self.chat()
        self.exchange(
            rng.choice(("What was on my list?", "What is my list?", "Tell me my list.")), f"Your list is: {back}."
        )

    def turn(self) -> None:
        """Something happens: what, depends on how much there is to ask for."""
        rng = self.rng
        known = [fact for key, fact in self.facts.items() if key not in self.kept_back]
        draw = rng.random()
        if draw < 0.40 and known:
            # Half of the questions go to what was not mentioned for the longest time: far recall is the rarer skill.
            fact = known[0] if rng.random() < 0.5 else rng.choice(known)
            if rng.random() < 0.15 and len(known) > 1:
                self.ask(fact, rng.choice([other for other in known if other is not fact]))
            else:
                self.ask(fact)
        elif draw < 0.45 and (draw >= 0.40 or not self.facts):
            self.ask_unknown()  # more often where nothing was told at all, never because of what is kept back
        elif draw < 0.70 and len(known) < 24:
            new = self.news(name="name" not in self.facts and rng.random() < 0.35)
            both = (new, self.news())
            self.tell(*(both if rng.random() < 0.25 and both[0].key != both[1].key else both[:1]))
        elif draw < 0.955:
            self.chat()
        elif draw < 0.98:
            self.repeat_list()
        else:
            self.hear_story()


def _fill(template: str, value: str, rng: random.Random) -> str:
    return expand(template, {"v": value, "month": rng.choice(words.MONTHS)}, rng)


def conversation(rng: random.Random, characters: int, unseen: bool = False, far: float = 0.0) -> list[Message]:
    """Write a conversation of at least ``characters`` characters; recalled values stand between marks.

    Args:
        rng: source of every choice.
        characters: how long it has to be.
        unseen: use only names that training text never contains.
        far: share of conversations that begin with facts, go on to other things, and end with questions for what was
            told at the beginning: many recalls over the whole length, which are rare in talk that wanders.
    """
    talk = Conversation(rng, unseen)
    if rng.random() < 0.08:
        talk.messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    if rng.random() < 0.5:
        talk.tell(draw_fact(rng, unseen, name=rng.random() < 0.6))
    if rng.random() < far:
        _ask_from_afar(talk, characters)
    while talk.length < characters:
        talk.turn()
    return talk.messages


def _ask_from_afar(talk: Conversation, characters: int) -> None:
    """Facts, then other things for about half of ``characters``, then questions for the facts in any order."""
    rng = talk.rng
    told_by, asked_from = rng.uniform(0.05, 0.3) * characters, rng.uniform(0.55, 0.85) * characters
    while talk.length < told_by:
        draw = rng.random()
        if draw < 0.7:
            talk.tell(talk.news(name="name" not in talk.facts and rng.random() < 0.35))
        elif draw < 0.85 and talk.facts:
            talk.ask(rng.choice(list(talk.facts.values())))
        else:
            talk.chat()
    talk.kept_back = frozenset(key for key in talk.facts if rng.random() < 0.7)
    while talk.length < asked_from:
        talk.turn()
    asked = rng.sample(sorted(talk.kept_back), len(talk.kept_back))
    while asked and talk.length < characters:
        if rng.random() < 0.8:
            key = asked.pop()
            talk.kept_back -= {key}
            talk.ask(talk.facts[key])
        else:
            talk.turn()
    talk.kept_back = frozenset()


def render(messages: list[Message], add_generation_prompt: bool = False) -> str:
    """The text of a conversation in the chat format, the same that the checkpoint's chat template gives."""
    turns = [f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages]
    return BOS + "".join(turns) + (f"{START}assistant\n" if add_generation_prompt else "")
