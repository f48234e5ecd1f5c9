"""Tokens that a chat template writes and a message must not: special ones, and others that mark places in a template.

Some models mark roles with added tokens that are not special (``<｜User｜>`` of DeepSeek's distilled ones), and Qwen3
marks thoughts so (``<think>``). Next: ``tokenizer.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import tokenizers

# As <｜User｜>, [INST] and {name} are: nothing that somebody would say.
_MARK = re.compile(r"[<\[{].+[>\]}]\Z", re.DOTALL)


def template_marks(added: Mapping[int, tokenizers.AddedToken], template: str) -> dict[int, tokenizers.AddedToken]:
    """Of added tokens by id, those that are not special and mark places in a chat template's source."""
    return {
        i: token
        for i, token in added.items()
        if not token.special and _MARK.match(token.content) and token.content in template
    }


def without_tags(
    marks: Mapping[int, tokenizers.AddedToken], added: Mapping[int, tokenizers.AddedToken]
) -> dict[int, tokenizers.AddedToken]:
    """Of marks, those that are no tags, which open and close something (``<think>``, ``</think>``)."""
    texts = {token.content for token in added.values()}
    return {i: token for i, token in marks.items() if _other_half(token.content) not in texts}


def as_special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """The same as a special token, found in a text as it is and not as a normaliser would have it."""
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=True,
    )


class ReservedTokens:
    """Added tokens, found in a text as the tokenizers library finds them.

    Args:
        tokens: by id.
    """

    def __init__(self, tokens: Mapping[int, tokenizers.AddedToken]) -> None:
        self._ids = {token.content: i for i, token in tokens.items()}
        self._tokens = dict(tokens)
        longest_first = sorted(tokens.values(), key=lambda token: len(token.content), reverse=True)
        patterns = [
            rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
            for token in longest_first
        ]
        self._pattern = re.compile("|".join(patterns) or r"(?!)")  # or what is nowhere

    def found_in(self, text: str) -> list[str]:
        """Those that a text names."""
        return self._pattern.findall(text)

    def replaced(self, text: str, by: Mapping[str, str]) -> str:
        """A text with others in their place."""
        return self._pattern.sub(lambda match: by[match[0]], text)

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The parts of a text, each with the token behind it; None behind the last."""
        end, strips = 0, False  # the token in front takes the space behind it
        for match in self._pattern.finditer(text):
            token = self._ids[match[0]]
            part = text[end : match.start()].lstrip() if strips else text[end : match.start()]
            yield part.rstrip() if self._tokens[token].lstrip else part, token
            end, strips = match.end(), self._tokens[token].rstrip
        yield text[end:].lstrip() if strips else text[end:], None


def _other_half(tag: str) -> str:
    """The tag that closes one, or opens it."""
    return f"<{tag[2:]}" if tag.startswith("</") else f"</{tag[1:]}"
