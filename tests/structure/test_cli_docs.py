"""docs/cli.md is what the commands say of themselves."""

from __future__ import annotations

from pathlib import Path

from cli.main import COMMANDS
from cli.reference import page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_about_the_command_line_is_what_the_commands_say() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page(), "`make docs` writes it anew"


def test_the_page_has_every_command() -> None:
    assert [name for name in COMMANDS if f"\n## axon {name}\n" not in page()] == []


def test_every_option_says_what_it_means() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert [row for row in rows if not row.split("|")[2].strip()] == []
