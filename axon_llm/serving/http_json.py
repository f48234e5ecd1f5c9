"""Strict JSON: one object, read from untrusted bytes without surprises.

Python's own reader takes ``NaN``, keeps the last of two equal keys, overflows ``1e999`` to infinity, lets half a
surrogate pair through and answers deep nesting with a ``RecursionError``. Each is refused here, with HTTP 400, before
anything else looks at the body.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from axon_llm.serving.http_errors import invalid_json

MAX_DEPTH = 32
MAX_INTEGER_DIGITS = 30

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def parse_object(body: bytes) -> dict[str, Any]:
    """Reads ``body`` as one JSON object.

    Raises:
        ApiError: 400 ``invalid_json``, saying which rule was broken; the body's content is not quoted.
    """
    if not body.strip():
        raise invalid_json("The body is empty; a JSON object is expected.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_json(f"The body is not UTF-8 (byte {error.start}).") from None
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short_integer,
        )
    except json.JSONDecodeError as error:
        raise invalid_json(
            f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from None
    if not isinstance(value, dict):
        raise invalid_json(f"The body must be a JSON object, not {_kind(value)}.")
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        character = match.group()
        if character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise invalid_json(f"The body is nested more than {MAX_DEPTH} deep.")
        elif character in "]}":
            depth -= 1


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise invalid_json("An object in the body has the same key twice.")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise invalid_json(f"The body holds {name}, which is not JSON.")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise invalid_json("A number in the body is too large.")
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise invalid_json(f"An integer in the body has more than {MAX_INTEGER_DIGITS} digits.")
    return int(digits)


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise invalid_json("A string in the body holds half of a surrogate pair.") from None


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]
