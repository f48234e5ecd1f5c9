"""``make gpu`` runs on a machine that has little more than PyTorch; its tests must be importable there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "tests" / "gpu").glob("*.py"))
ABSENT = (
    "hypothesis", "pydantic", "pydantic_settings", "redis", "pika", "starlette", "uvicorn", "prometheus_client", "httpx",
    "openai", "matplotlib", "gguf", "llama_cpp", "huggingface_hub",
)  # fmt: skip


def on_a_bare_machine(program: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "tests" / "gpu")]
    head = f"import sys\nsys.path[:0] = {paths!r}\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    return subprocess.run([sys.executable, "-c", head + program], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_gpu_tests_need_only_what_a_bare_gpu_machine_has() -> None:
    names = [path.stem for path in MODULES]
    assert "conftest" in names
    program = f"import importlib\nimport conftest\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    done = on_a_bare_machine(program)
    assert done.returncode == 0, done.stderr


def test_the_program_behind_make_gpu_needs_no_more() -> None:
    parts = ("axon_llm.bench.gpu", "axon_llm.bench.report", "axon_llm.bench.torch_peers", "axon_llm.checkpoint")
    done = on_a_bare_machine(f"import {', '.join(parts)}, cli.benchmarks")
    assert done.returncode == 0, done.stderr


def test_every_test_that_needs_a_gpu_is_in_the_folder_that_make_gpu_runs() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if path.parent.name not in ("gpu", "structure"):
            assert "mark.gpu" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem.startswith("test_")], ids=lambda p: p.stem)
def test_names_of_gpu_test_files_meet_no_other(path: Path) -> None:
    assert list((ROOT / "tests").rglob(path.name)) == [path]
