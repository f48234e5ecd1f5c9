"""Imports run one way, and the light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "axon_llm").rglob("*.py"), *(ROOT / "cli").glob("*.py")])

# The house, from the ground up. A file may import from its own floor and from those below.
FLOORS = (
    ("axon_llm.errors",),
    ("axon_llm.config_keys",),
    ("axon_llm.rope_config",),
    ("axon_llm.config", "axon_llm.locate", "axon_llm.chat_template"),
    ("axon_llm.token_bytes", "axon_llm.reserved_tokens"),
    ("axon_llm.cache", "axon_llm.shapes", "axon_llm.tokenizer"),
    ("axon_llm.layers",),
    ("axon_llm.model",),
    ("axon_llm.checkpoint", "axon_llm.fast"),
    ("axon_llm.engine",),
    ("axon_llm.serving", "axon_llm.bench"),
    ("cli",),
)
# Readers of a plan or of a request's shape need no torch, so these files are on the ground floor wherever they lie.
STANDARD_LIBRARY_ONLY = (
    "axon_llm.errors",
    "axon_llm.config",
    "axon_llm.config_keys",
    "axon_llm.rope_config",
    "axon_llm.shapes",
    "axon_llm.engine.params",
    "axon_llm.engine.events",
    "axon_llm.fast.plan",
)
TORCH_ALONE = ("axon_llm.cache", "axon_llm.layers", "axon_llm.model")
OWNERS = {
    "pika": ("axon_llm.serving",),
    "redis": ("axon_llm.serving",),
    "matplotlib": ("cli", "axon_llm.serving.load_picture"),
}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "stuff", "base", "core", "lib"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports(path: Path, *, when_typing: bool = True) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in the file it does so."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    if not when_typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if not (node.level and not node.module):
                yield source
            parts = (f"{source}.{alias.name}" for alias in node.names)  # from a package, its modules
            yield from (part for part in parts if part in MODULES or (node.level and not node.module))


def within(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def floor_of(module: str) -> int | None:
    found = [level for level, names in enumerate(FLOORS) if within(module, *names)]
    return found[0] if found else None


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_from_its_own_floor_or_from_below(path: Path) -> None:
    module = module_of(path)
    if module == "axon_llm":  # exports lazily what is above it
        return
    own = floor_of(module)
    assert own is not None, f"{module} has no place in the house: add it to FLOORS"
    for name in imports(path):
        if not within(name, "axon_llm", "cli") or name == "axon_llm" or within(name, *STANDARD_LIBRARY_ONLY):
            continue
        level = floor_of(name)
        assert level is not None, f"{module} imports {name}, which has no place in the house"
        assert level <= own, f"{module} imports {name} from above"


def test_serving_and_measuring_do_not_know_each_other() -> None:
    for path in FILES:
        for one, other in (("axon_llm.serving", "axon_llm.bench"), ("axon_llm.bench", "axon_llm.serving")):
            if within(module_of(path), one):
                assert not [name for name in imports(path) if within(name, other)], path


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_what_is_said_to_need_the_standard_library_alone_needs_it_alone(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    for name in imports(path, when_typing=False):
        assert name.split(".")[0] in sys.stdlib_module_names or within(name, *STANDARD_LIBRARY_ONLY), name


@pytest.mark.parametrize("path", [path for path in FILES if within(module_of(path), *TORCH_ALONE)], ids=module_of)
def test_the_model_and_what_is_under_it_import_torch_alone(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top in ("torch", "axon_llm"), name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_broker_redis_and_drawing_libraries_stay_with_their_owners(path: Path) -> None:
    for name in imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or within(module_of(path), *owners), f"{module_of(path)} imports {name}"


def test_pika_is_imported_by_the_brokers_parts_alone() -> None:
    users = {module_of(path) for path in FILES if any(within(name, "pika") for name in imports(path))}
    assert users == {f"axon_llm.serving.{part}" for part in ("amqp", "consumer", "publisher")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_a_drawer(path: Path) -> None:
    assert path.stem not in DRAWERS
    assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").strip(), "what is this file for?"


HEAVY = ("torch", "numpy", "matplotlib", "transformers")


@pytest.mark.parametrize(
    ("program", "forbidden"),
    [
        ("import axon_llm", (*HEAVY, "typer", "rich", "pydantic", "redis", "pika")),
        ("from cli.main import main; main(['--help'])", (*HEAVY, "typer", "rich", "pydantic", "redis", "pika")),
        ("from cli.main import main; main(['--version'])", (*HEAVY, "typer", "rich")),
        ("from cli.main import main; main(['nonsense'])", (*HEAVY, "typer", "rich")),
        *(
            (f"from cli.main import main; main([{name!r}, '--help'])", HEAVY)
            for name in (
                "generate",
                "chat",
                "compare",
                "inspect",
                "bench",
                "serve",
                "session-manager",
                "worker",
                "keys",
                "load",
            )
        ),
        ("import axon_llm.serving.session_manager, axon_llm.serving.http_app", HEAVY),
        ("import cli.session_manager, cli.keys, cli.load", HEAVY),
        ("import axon_llm.tokenizer, axon_llm.locate, axon_llm.shapes, axon_llm.engine.events", ("torch",)),
    ],
)
def test_the_light_parts_never_reach_the_heavy_libraries(program: str, forbidden: tuple[str, ...]) -> None:
    check = f"import sys\n{program}\nsys.stderr.write(','.join(m for m in {forbidden!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    reached = done.stderr.splitlines()[-1].split(",") if done.stderr else []
    assert not set(reached) & set(forbidden), done.stderr


def test_importing_the_package_sets_nothing_up() -> None:
    program = (
        "import logging, signal, os\n"
        "before = (list(logging.root.handlers), signal.getsignal(signal.SIGINT), dict(os.environ))\n"
        "import axon_llm.engine.engine, axon_llm.checkpoint, axon_llm.fast.replace, cli.main\n"
        "import axon_llm.serving.worker_process, axon_llm.serving.session_manager\n"
        "import torch\n"
        "after = (list(logging.root.handlers), signal.getsignal(signal.SIGINT), dict(os.environ))\n"
        "assert before == after, (before, after)\n"
        "assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
