"""Fields of OpenAI's requests that may come in several shapes, each brought into one.

For pydantic, before its own checks: a ``ValueError`` becomes a 400 that names the field. Read ``openai_requests.py``.
"""

from __future__ import annotations

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIAS = 1024


def stop_strings(value: object) -> object:
    """``null``, a string or an array of strings → an array of strings."""
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise ValueError("must be a string or an array of strings")
    if len(values) > MAX_STOP_STRINGS:
        raise ValueError(f"has {len(values)} entries; the limit is {MAX_STOP_STRINGS}")
    for text in values:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ValueError(f"each stop string must have 1 to {MAX_STOP_LENGTH} characters")
    return values


def text_content(value: object) -> object:
    """A string, or an array of text parts, → a string."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string or an array of text parts")
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise ValueError('each content part must be {"type": "text", "text": …}; other kinds are not supported')
        if not isinstance(part["text"], str):
            raise ValueError("the text of a content part must be a string")
    return "".join(part["text"] for part in value)


def token_bias(value: object) -> object:
    """OpenAI's object of token ids as strings → ``{int: float}``."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token id → bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"has {len(value)} entries; the limit is {MAX_LOGIT_BIAS}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            raise ValueError("each key must be a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("each bias must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def one_prompt(value: object) -> object:
    """A string, an array of token ids, or an array holding exactly one string."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if len(value) == 1 and isinstance(value[0], str) and value[0]:
            return value[0]
        if all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value):
            return tuple(value)
    raise ValueError("must be one text or one array of token ids, and not empty")
