"""Test cases for recall: a fact, so many tokens of other talk, and the question for the fact.

Names are held out of training, and so are the combinations of key and value; ``distance`` counts the tokens from the
last mention of the value to the place where the answer begins.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from .dialogues import Conversation, Message, render
from .facts import Fact, draw_fact
from .templates import OPEN, expand, unmark


@dataclass(frozen=True)
class RecallCase:
    """One conversation that ends with a question.

    Attributes:
        prompt: token ids up to where the assistant's answer begins.
        value: what the answer has to contain.
        key: what the fact is about.
        distance: tokens between the value's last mention and the answer.
    """

    prompt: tuple[int, ...]
    value: str
    key: str
    distance: int


def recall_case(tokenizer: Tokenizer, rng: random.Random, distance: int, name: bool) -> RecallCase:
    """Write a case at about this distance, about the user's name or any other fact."""
    while True:
        fact = draw_fact(rng, unseen=True, name=name)
        talk, filler = Conversation(rng, unseen=True), Conversation(rng, unseen=True)
        talk.tell(fact)
        question = expand(rng.choice(fact.asks), {"v": fact.value}, rng)
        asked = {"role": "user", "content": question}
        for _ in range(400):
            reached = _distance(tokenizer, [*talk.messages, asked], fact.value)
            if reached >= 0.93 * distance:
                break
            exchange = _other_talk(filler, fact)
            longer = _distance(tokenizer, [*talk.messages, *exchange, asked], fact.value)
            if longer <= 1.07 * distance + 8:
                talk.messages += exchange
        if 0.85 * distance <= reached <= 1.1 * distance + 8:
            prompt = _ids(tokenizer, [*talk.messages, asked])
            return RecallCase(tuple(prompt), fact.value, fact.key, reached)


def _other_talk(filler: Conversation, fact: Fact) -> list[Message]:
    """The next exchange about anything but the fact: neither its key nor its value occurs in it."""
    while True:
        filler.messages = []
        filler.facts[fact.key] = fact  # known, so that nobody asks for it as for something never told
        filler.turn()
        text = " ".join(message["content"] for message in filler.messages)
        replaced = filler.facts[fact.key] is not fact
        if filler.messages and not replaced and fact.value.lower() not in text.lower():
            return filler.messages


def _ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    text, _ = unmark(render(messages, add_generation_prompt=True))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _distance(tokenizer: Tokenizer, messages: list[Message], value: str) -> int:
    text, _ = unmark(render(messages, add_generation_prompt=True))
    end = text.lower().rindex(value.lower()) + len(value)
    return len(tokenizer.encode(text[end:], add_special_tokens=False).ids)


def recalled(answer: str, value: str) -> bool:
    """Whether the answer contains the value, as whole words and in its own capitals, the first letter aside."""
    assert OPEN not in value
    words = "".join(letter if letter.isalnum() or letter in "'" else " " for letter in answer).split()
    wanted = "".join(letter if letter.isalnum() or letter in "'" else " " for letter in value).split()
    windows = [words[i : i + len(wanted)] for i in range(len(words) - len(wanted) + 1)]
    return any(window[1:] == wanted[1:] and window[0].lower() == wanted[0].lower() for window in windows)
