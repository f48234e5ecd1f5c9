"""Chat templates are programs from strangers: they get what they need, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from axon_llm.chat_template import ChatTemplate
from axon_llm.errors import RequestError, TokenizerError

USER = [{"role": "user", "content": "hello"}]


def render(source: str, messages: list[dict[str, object]] | None = None) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or USER)


def test_what_published_templates_use_is_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m.content | trim | tojson }}{% endgeneration %}\n"
        "{% endfor %}{% if add_generation_prompt %}go{% endif %}{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    messages = [{"role": "user", "content": f" é{i} "} for i in range(9)]
    assert render(source, messages) == '<s>"é0""é1""é2"go4True'


def test_a_template_that_writes_the_date_writes_the_one_it_is_told() -> None:
    template = ChatTemplate("{% macro today() %}{{ strftime_now('%d %b %Y %H') }}{% endmacro %}{{ today() }}", {})
    assert template.render(USER, now=datetime(2001, 2, 3, 23, 59, tzinfo=UTC)) == "03 Feb 2001 23"


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 if false else missing.attribute }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TokenizerError, match="chat template fails"):
        render(source)


def test_a_broken_template_is_one_clear_error() -> None:
    with pytest.raises(TokenizerError, match="not valid Jinja"):
        render("{% for %}")
