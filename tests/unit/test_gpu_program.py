"""What ``make gpu`` makes of stages that fail, crash or hang. The stages themselves need a GPU; here they are played."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from axon_llm.bench import gpu
from axon_llm.bench.gpu import Stage, measure_modes, run_all, run_process, run_stage

Player = Callable[[str, list[str], Path], int]


def play(monkeypatch: pytest.MonkeyPatch, out: Path, player: Player) -> list[list[str]]:
    """Have stages played instead of run; returns the modes (or ``tests``) each process was started with."""
    started: list[list[str]] = []

    def run(words: list[str], deadline: float) -> int:
        if "pytest" in words:
            started.append(["tests"])
            return player("", ["tests"], out)
        at = words.index("--shape")
        shape, modes = words[at + 1], words[at + 2 :]
        started.append(modes)
        return player(shape, modes, out)

    monkeypatch.setattr(gpu, "run_process", run)
    return started


def all_well(shape: str, modes: list[str], out: Path) -> int:
    for mode in modes if shape else []:
        (out / f"gpu-{shape}-{mode}.started").touch()
    return 0


def test_every_stage_runs_whatever_became_of_the_ones_before_and_the_worst_code_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gpu-llama-3.2-1b-int8.json").write_text("of an earlier run")

    def player(shape: str, modes: list[str], out: Path) -> int:
        all_well(shape, modes, out)
        return 3 if modes == ["tests"] else 1 if "llama-3.1-8b" in shape else 0

    started = play(monkeypatch, tmp_path, player)
    todo = gpu.stages()
    assert run_all(todo, tmp_path, 1e6) == 3
    assert len(started) == len(todo)
    assert [stage.code for stage in todo] == [3, *(int(stage.shape == gpu.LARGE) for stage in todo[1:])]
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"][0]["code"] == 3
    assert not list(tmp_path.glob("gpu-*"))


def test_a_stage_there_is_no_time_for_is_a_failure_unless_it_was_a_wish(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    play(monkeypatch, tmp_path, all_well)
    assert run_all([Stage("needed", 10, "s", ("bf16",))], tmp_path, 1.0) == 1
    assert run_all([Stage("wished for", 10, "s", ("bf16",), must=False)], tmp_path, 1.0) == 0


def test_after_a_crash_the_modes_not_yet_begun_get_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def player(shape: str, modes: list[str], out: Path) -> int:
        return -11 if all_well(shape, modes[:1], out) == 0 and modes[0] == "int8" else all_well(shape, modes, out)

    started = play(monkeypatch, tmp_path, player)
    assert run_stage(Stage("s", 10, "s", ("int8", "bf16", "int4")), tmp_path, time.monotonic() + 10) == 11
    assert started == [["int8", "bf16", "int4"], ["bf16", "int4"]]


def test_a_process_that_dies_before_it_begins_is_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = play(monkeypatch, tmp_path, lambda *_: 1)
    assert run_stage(Stage("s", 10, "s", ("int8", "bf16")), tmp_path, time.monotonic() + 10) == 1
    assert len(started) == 1


def test_a_process_that_hangs_is_stopped_at_its_limit() -> None:
    assert run_process(["-c", "import time; time.sleep(600)"], time.monotonic() + 0.5) == 124
    assert run_process(["-c", "raise SystemExit(7)"], time.monotonic() + 60) == 7


def test_a_mode_that_ran_other_than_asked_is_written_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(shape: str, mode: str) -> dict[str, object]:
        if mode == "int4":
            raise ValueError("this mode alone")
        return {"compiled": False, "captured": mode != "int8"}

    monkeypatch.setattr(gpu, "measure_mode", measure)
    assert measure_modes("s", ["int4", "int8", "compiled", "bf16"], tmp_path) == 1
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "gpu-s-bf16.json", "gpu-s-compiled.json", "gpu-s-int8.json",
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "s int8 was not captured\n" in said
    assert "s compiled was not compiled\n" in said
    assert measure_modes("s", ["bf16"], tmp_path) == 0


def test_stages_can_be_named_and_a_wrong_name_is_said_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = play(monkeypatch, tmp_path, all_well)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("GPT_FAST", raising=False)
    assert gpu.main(["--out", str(tmp_path), "--stage", "1B shape", "--stage", "tests"]) == 0
    assert started == [["bf16", "int8", "int4"], ["tests"]]
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--out", str(tmp_path), "--stage", "8B shape and gpt-fast"])
    assert refused.value.code == 2
    assert "8B shape and gpt-fast" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_passes_for_a_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
