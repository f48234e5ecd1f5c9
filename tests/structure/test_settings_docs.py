"""docs/settings.md has every setting, with the default, unit and limits that the program has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.settings import ServingSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
SIGNS = {"gt": ">", "ge": "≥", "le": "≤"}
UNITS = {"s": "s", "bytes": "bytes"}


def rows(section: str) -> dict[str, list[str]]:
    """The cells of a section's table, by variable."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row[1:] for row in cells}


def fields(section: str) -> dict[str, Any]:
    every = {f"AXON_{name.upper()}": field for name, field in ServingSettings.model_fields.items()}
    if section == "Every process":
        return every
    more = {f"AXON_{name.upper()}": field for name, field in SessionManagerSettings.model_fields.items()}
    return {name: field for name, field in more.items() if name not in every}


def default(value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return "none"
    if isinstance(value, bool | tuple):
        return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{list(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def limits(field: Any) -> str:
    found = [
        f"{sign} {getattr(part, key)}" for part in field.metadata for key, sign in SIGNS.items() if hasattr(part, key)
    ]
    return ", ".join(found)


SECTIONS = ("Every process", "Session manager")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_has_every_setting_and_no_other(section: str) -> None:
    assert list(rows(section)) == list(fields(section))


@pytest.mark.parametrize("section", SECTIONS)
def test_defaults_units_and_limits_on_the_page_are_the_programs(section: str) -> None:
    for name, field in fields(section).items():
        shown_default, unit, shown_limits, meaning = rows(section)[name]
        assert shown_default == default(field.default), name
        assert UNITS.get(name.rsplit("_", 1)[-1].lower(), unit) == unit, name
        if limits(field):
            assert shown_limits == limits(field), name
        assert meaning, name
        assert ("`…_FILE`" in meaning) == (field.annotation is SecretStr), name


def test_the_hint_of_a_wrong_setting_names_the_page() -> None:
    from axon_llm.errors import UsageError
    from axon_llm.serving.settings import read_settings

    with pytest.raises(UsageError) as refused:
        read_settings(poll_s=-1)
    assert refused.value.hint is not None
    named = re.search(r"docs/\S+\.md", refused.value.hint)
    assert named is not None
    assert (PAGE.parents[1] / named[0]).samefile(PAGE)
