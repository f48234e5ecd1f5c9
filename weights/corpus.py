"""Endless training text: documents as tokens, with a weight for each token, in rows of one length.

Every row is a function of (data seed, step, row) alone, so a resumed run sees exactly what an unbroken one would have
seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .dialogues import BOS, EOS, conversation, render
from .stories import story
from .templates import unmark

USER_WEIGHT = 0.1  # what a user says is mostly chance: little can be learnt from predicting it
RECALL_WEIGHT = 5.0  # a value that stood earlier in the text: the skill that matters
FAR_SHARE = 0.4  # of conversations ask at the end for what was told at the beginning
PRONOUN_WEIGHT = 3.0  # who is "he" and who is "she" has to be remembered, and names do not tell
PRONOUNS = tuple(f"Ġ{word}" for word in "he she his her him He She His Her".split())
CHARACTERS_PER_TOKEN = 4.5


def story_text(rng: random.Random, unseen: bool = False) -> str:
    """A story as a document of its own, marks included."""
    return BOS + story(rng, unseen=unseen).text + EOS


def dialogue_text(rng: random.Random, tokens: int, unseen: bool = False) -> str:
    """A conversation of at least about ``tokens`` tokens as a document of its own, marks included."""
    return render(conversation(rng, int(tokens * CHARACTERS_PER_TOKEN), unseen, FAR_SHARE))


def encode(tokenizer: Tokenizer, marked: str) -> tuple[list[int], list[float]]:
    """Tokens of a document and the weight of each one as a *target* of prediction."""
    text, spans = unmark(marked)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    start, user, system = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "user", "system"))
    pronouns = {tokenizer.token_to_id(word) for word in PRONOUNS}
    ids, weights, weight = encoding.ids, [], 1.0
    for before, token in zip([0, *ids], ids, strict=False):
        if before == start:
            weight = USER_WEIGHT if token in (user, system) else 1.0
        weights.append(weight * PRONOUN_WEIGHT if token in pronouns else weight)
    span, recalled = 0, [(begin, end) for begin, end in spans]
    for i, (begin, end) in enumerate(encoding.offsets):
        while span < len(recalled) and recalled[span][1] <= begin:
            span += 1
        if span < len(recalled) and recalled[span][0] < end:
            weights[i] = RECALL_WEIGHT
    return ids, weights


def said_by_assistant(tokenizer: Tokenizer, ids: list[int]) -> list[bool]:
    """Which tokens of a conversation the assistant itself says: its words, and the mark with which it ends its turn.

    The other marks of the chat format are given, not said, and predicting them is no merit.
    """
    start, end, role = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", "assistant"))
    said, begins = [], len(ids)  # where the words of the turn begin
    for i, token in enumerate(ids):
        if token == start:
            begins = i + 3 if ids[i + 1 : i + 2] == [role] else len(ids)  # after the mark, the role and a line break
        said.append(i >= begins)
        if token == end:
            begins = len(ids)
    return said


def drill(rng: random.Random, vocab_size: int, length: int) -> tuple[list[int], list[float]]:
    """Meaningless tokens that come again: nothing to learn but to copy, whatever the token and the distance.

    Either one long stretch over and over, or short chunks, like names, in random order; only what has stood there
    before counts.
    """
    ids, weights = [0], [0.0]
    if rng.random() < 0.4:
        pattern = [rng.randrange(4, vocab_size) for _ in range(rng.randint(8, length // 2))]
        while len(ids) < length:
            weights += [0.0 if len(ids) == 1 else 1.0] * len(pattern)
            ids += pattern
        return ids[:length], weights[:length]
    chunks = [
        [rng.randrange(4, vocab_size) for _ in range(rng.randint(2, 5))] for _ in range(rng.randint(4, length // 12))
    ]
    seen: set[int] = set()
    while len(ids) < length:
        at = rng.randrange(len(chunks))
        weights += [0.0] + [1.0 if at in seen else 0.0] * (len(chunks[at]) - 1)
        ids += chunks[at]
        seen.add(at)
    return ids[:length], weights[:length]


def row(
    tokenizer: Tokenizer, rng: random.Random, length: int, stories: float, drills: float = 0.0, unseen: bool = False
) -> tuple[list[int], list[float]]:
    """Documents packed one after the other into ``length`` tokens, the last one cut.

    Args:
        tokenizer: the one to train with.
        rng: source of every choice.
        length: tokens in the row.
        stories: share of rows that hold stories; the others hold one conversation.
        drills: share of rows that hold a copying drill instead.
        unseen: use only names that training text never contains.
    """
    if rng.random() < drills:
        return drill(rng, tokenizer.get_vocab_size(), length)
    ids: list[int] = []
    weights: list[float] = []
    tells_stories = rng.random() < stories
    while len(ids) < length:
        text = story_text(rng, unseen) if tells_stories else dialogue_text(rng, length - len(ids), unseen)
        more_ids, more_weights = encode(tokenizer, text)
        ids += more_ids
        weights += more_weights
    return ids[:length], weights[:length]


def batch(
    tokenizer: Tokenizer, seed: str, rows: int, length: int, stories: float, drills: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One training batch: inputs, targets and target weights, each ``[rows, length]``."""
    built = [row(tokenizer, random.Random(f"{seed}/{i}"), length + 1, stories, drills) for i in range(rows)]
    tokens = torch.tensor([ids for ids, _ in built])
    return tokens[:, :-1], tokens[:, 1:], torch.tensor([weights for _, weights in built])[:, 1:]


def plain_text(seed: str, documents: int) -> Iterator[str]:
    """Training text without marks and special tokens, for the tokenizer to be trained on."""
    rng = random.Random(seed)
    for _ in range(documents):
        yield unmark(story(rng).text)[0]
        for message in conversation(rng, 2000):
            yield f"{message['role']}\n{unmark(message['content'])[0]}"
