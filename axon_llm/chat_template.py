"""Chat templates: a conversation to the text a model was trained on, by the checkpoint's own Jinja template.

A template is a program that came with the weights. It runs in Jinja's immutable sandbox, where it can read the messages
and build a string, and nothing else. The environment offers what Hugging Face templates expect: ``raise_exception``,
``strftime_now``, ``tojson``, ``break`` and ``continue``, and the ``generation`` tag (whose body is rendered as it is).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from axon_llm.errors import RequestError, TokenizerError


class _Refused(Exception):
    """The template itself refused the conversation (``raise_exception``)."""


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads it as a class attribute

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja source.
        special_tokens: names a template may use, such as ``bos_token``, and their text.

    Raises:
        TokenizerError: the source is not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise TokenizerError(f"the chat template is not valid Jinja: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, now: datetime | None = None
    ) -> str:
        """The text of a conversation, ready for the model to answer if ``add_generation_prompt``.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with what an answer begins with.
            now: the time that a template is told; this machine's own when omitted.

        Raises:
            RequestError: the template refuses this conversation, for example for the order of its roles.
            TokenizerError: the template fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                strftime_now=(now or datetime.now().astimezone()).strftime,
                **self._special_tokens,
            )
        except _Refused as refusal:
            message = f"the model's chat template refuses these messages: {refusal}"
            raise RequestError(message, code="invalid_messages", param="messages") from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise TokenizerError(f"the chat template fails: {error}") from None


def _refuse(message: str) -> None:
    raise _Refused(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    """JSON as transformers writes it: not escaped for HTML, not restricted to ASCII."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
