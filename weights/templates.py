"""A tiny language for sentences: ``[one|another]`` picks, ``{slot}`` fills in, and "a" becomes "an" where it must.

Text that the model has to recall, and not to guess, is put between two marks on the way; ``unmark`` takes them out and
says where they stood, so that training can weigh those tokens more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

OPEN, CLOSE = "\x01", "\x02"

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([^{}]+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=\x01?(?:hon|hour|(?!one\b|use|uni|eu)[aeiouAEIOU]))")


def expand(template: str, slots: Mapping[str, str], rng: random.Random) -> str:
    """Fill in a template; a slot written with a capital, ``{He}``, is ``{he}`` with a capital.

    Raises:
        KeyError: the template names a slot that is not given.
    """
    while "[" in template:
        template = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        return slots[name] if name in slots else capital(slots[name[0].lower() + name[1:]])

    while "{" in template:
        template = _SLOT.sub(value, template)
    return _ARTICLE.sub(r"\1n ", template)


def capital(text: str) -> str:
    """``text`` with its first letter, marks aside, in upper case."""
    at = 1 if text.startswith(OPEN) else 0
    return text[:at] + text[at : at + 1].upper() + text[at + 1 :]


def mark(text: str) -> str:
    """Mark ``text`` as something to recall."""
    return f"{OPEN}{text}{CLOSE}"


def unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks out; return the text and where each marked stretch begins and ends in it."""
    pieces, spans, length = [], [], 0
    for i, piece in enumerate(re.split(f"[{OPEN}{CLOSE}]", text)):
        if i % 2:
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), spans
