"""The house stays small where it is read first, and whole when it is installed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READING_PATH = ("axon_llm/cache.py", "axon_llm/layers/attention.py", "axon_llm/model.py", "axon_llm/engine/generate.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
THROUGH_ANOTHER = {"h11": "uvicorn", "triton": "torch"}  # come with it: uvicorn's HTTP protocol class, GPU kernels
FOLDERS = {"axon_llm": ROOT / "axon_llm", "axon_cli": ROOT / "cli", "axon_weights": ROOT / "weights"}


def modules_imported(path: Path) -> set[str]:
    found: set[str] = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            found.update({source, *(f"{source}.{alias.name}" for alias in node.names)})
    return found


def test_how_a_kv_cache_works_can_be_read_in_fewer_than_600_lines() -> None:
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in READING_PATH}
    assert sum(lines.values()) < 600, lines


@pytest.mark.parametrize("name", READING_PATH)
def test_the_reading_path_is_free_of_speed_tricks_and_serving(name: str) -> None:
    elsewhere = ("axon_llm.fast", "axon_llm.serving", "axon_llm.bench", "axon_llm.engine.runner", "torch.compiler")
    reached = modules_imported(ROOT / name)
    assert reached
    assert not [module for module in reached if f"{module}.".startswith(tuple(f"{other}." for other in elsewhere))]
    source = (ROOT / name).read_text(encoding="utf-8")
    assert "torch.compile" not in source
    assert ast.get_docstring(ast.parse(source))


def test_every_package_of_the_source_tree_is_installed() -> None:
    """A package that is missing from the list works from the source tree and is not in the wheel."""
    present = {
        ".".join((package, *path.parent.relative_to(folder).parts))
        for package, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
    }
    assert present == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_file_that_is_no_program_is_installed_with_its_package() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in FOLDERS[package.split(".")[0]].joinpath(*package.split(".")[1:]).glob(pattern)
    }
    wanted = {
        path
        for folder in (ROOT / "axon_llm", ROOT / "cli", ROOT / "weights" / "axon-tiny")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert wanted
    assert wanted <= packaged, sorted(wanted - packaged)


def test_an_installed_axon_occupies_no_global_name_but_its_own() -> None:
    tops = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert all(top.startswith("axon_") for top in tops), tops


def test_every_third_party_import_of_the_program_is_a_declared_dependency() -> None:
    project = PROJECT["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    known = {re.split("[<>=]", name)[0].replace("-", "_") for name in declared} | THROUGH_ANOTHER.keys()
    imported = {
        module.split(".")[0]
        for folder in (ROOT / "axon_llm", ROOT / "cli")
        for path in folder.rglob("*.py")
        for module in modules_imported(path)
    }
    foreign = imported - set(sys.stdlib_module_names) - FOLDERS.keys() - {"cli"}  # itself, by its name in the tree
    assert {"torch", "pika"} <= foreign
    assert foreign <= known, sorted(foreign - known)
    assert set(THROUGH_ANOTHER.values()) <= known
