"""The README's links and commands: a page that points at the wrong line teaches the wrong thing."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[([^\]]*)\]\(([^)#\s]+)(?:#L(\d+))?\)", README)
COMMANDS = sorted({line[2:] for line in README.splitlines() if line.startswith("$ axon ")})


def test_the_readme_has_links_and_commands_to_check() -> None:
    assert len([link for link in LINKS if link[2]]) >= 5
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize(("text", "path", "line"), [link for link in LINKS if "://" not in link[1]])
def test_every_link_in_the_readme_points_at_what_it_names(text: str, path: str, line: str) -> None:
    target = ROOT / path
    assert target.exists(), f"{path} does not exist"
    if line:
        named = re.findall(r"`([^`]+)`", text)[-1].split(".")[-1].split("(")[0]
        source = target.read_text(encoding="utf-8").splitlines()
        assert named in source[int(line) - 1], f"{path}#L{line} is {source[int(line) - 1]!r}, without {named!r}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_is_one_that_exists_with_those_options(command: str) -> None:
    words = shlex.split(command, comments=True)
    name, options = words[1], [word.split("=")[0] for word in words if word.startswith("-")]
    if name.startswith("-"):
        name, options = "", words[1:]
    arguments = [name] if name else []
    if name == "keys":
        arguments = words[1:3]
    shown = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "NO_COLOR": "1"},
    )
    assert shown.returncode == 0, shown.stderr
    for option in options:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown.stdout), (
            f"{option} is not an option of axon {name}"
        )
