"""What generate, inspect, compare and bench print, as text and as JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from rich.console import Console

from axon_llm.bench import compare as comparing
from axon_llm.cache import KVCache
from axon_llm.checkpoint import tensor_headers
from axon_llm.locate import shipped_folder
from axon_llm.shapes import shape_config
from axon_llm.tokenizer import Tokenizer
from cli import loading
from cli.main import COMMANDS
from tests.unit.terminal import TINY, axon

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GREEDY = ("-t", "0")


def test_text_goes_to_standard_output_and_everything_else_to_standard_error() -> None:
    plain, told = (
        axon("generate", "hello", *TINY, *GREEDY, "-n", "8"),
        axon("generate", "hello", *TINY, *GREEDY, "-n", "8", "--stats"),
    )
    assert plain.out == told.out
    assert plain.out.endswith("\n")
    assert plain.err == ""
    assert "5 prompt tokens" in told.err
    assert "TTFT" in told.err


def test_generate_as_json_is_one_object_that_says_the_same() -> None:
    text = axon("generate", "hello", *TINY, *GREEDY, "-n", "8").out
    result = axon("generate", "hello", *TINY, *GREEDY, "-n", "8", "--json")
    assert result.out.count("\n") == 1
    report = result.json
    assert report["schema"] == "axon.generate/1"
    assert report["text"].rstrip("\n") == text.rstrip("\n")
    assert len(report["tokens"]) == report["usage"]["completion_tokens"] == 8
    assert report["usage"]["prompt_tokens"] == 5
    assert report["finish_reason"] == "length"
    assert 0 < report["timings"]["ttft_s"] <= report["timings"]["total_s"]


def test_the_prompt_is_read_from_standard_input_with_a_dash_or_without() -> None:
    given = axon("generate", "héllo", *TINY, *GREEDY, "-n", "4", "--json").json
    for words in (("generate", "-"), ("generate",)):
        assert axon(*words, *TINY, *GREEDY, "-n", "4", "--json", stdin="héllo").json["tokens"] == given["tokens"]


def test_without_the_cache_the_same_seed_gives_the_same_tokens() -> None:
    sampled = ("generate", "hello", *TINY, "--dtype", "float32", "-n", "12", "--seed", "5", "-t", "0.8", "--json")
    on, off = axon(*sampled).json, axon(*sampled, "--no-cache").json
    assert on["tokens"] == off["tokens"]
    assert (on["cache"], off["cache"]) == (True, False)
    assert axon(*sampled[:-1], "--json", "--seed", "6").json["tokens"] != on["tokens"]


def test_a_stop_string_ends_the_text_before_it() -> None:
    whole = axon("generate", "hello", *TINY, "-n", "30", "--seed", "1", "--json").json["text"]
    cut = axon("generate", "hello", *TINY, "-n", "30", "--seed", "1", "--json", "--stop", whole[3]).json
    assert cut["text"] == whole[: whole.index(whole[3])]
    assert cut["finish_reason"] == "stop"


def test_options_beat_variables_and_variables_beat_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXON_MODEL", "random:tiny")
    monkeypatch.setenv("AXON_MAX_TOKENS", "3")
    assert axon("generate", "hello", "--json", *GREEDY).json["usage"]["completion_tokens"] == 3
    assert axon("generate", "hello", "--json", *GREEDY, "-n", "2").json["usage"]["completion_tokens"] == 2
    monkeypatch.setenv("AXON_MODEL", "nothing-of-that-name")
    assert axon("generate", "hello").code == 3
    assert axon("generate", "hello", "-m", "random:tiny", "-n", "1").code == 0


def test_no_colour_where_none_is_wanted() -> None:
    for extra in ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, {}):
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "inspect", "random:tiny"],
            cwd=ROOT,
            env={**{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}, **extra},
            capture_output=True,
            check=True,
        )
        assert b"\x1b[3" not in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    shown = axon(name, "--help")
    assert shown.code == 0
    assert shown.out.startswith(f"Usage: axon {name}")
    assert axon("help", name).out == shown.out


def test_inspect_counts_what_a_model_holds_and_what_its_cache_takes() -> None:
    report = axon("inspect", "random:llama-3.2-1b", "--json", "--memory", "16GiB").json
    config = shape_config("llama-3.2-1b")
    assert report["schema"] == "axon.inspect/1"
    assert report["parameters"] == 1_235_814_400
    assert report["weight_bytes"] == 2 * 1_235_814_400
    assert report["kv_bytes_per_token"] == {"float32": 65536, "bfloat16": 32768}
    for entry in report["cache"]:
        dtype = getattr(torch, entry["dtype"])
        assert entry["bytes"] == KVCache.bytes_for(
            config, slots=entry["slots"], max_seq_len=entry["context"], dtype=dtype
        )
    for entry in report["fits"]:
        one = KVCache.bytes_for(config, slots=1, max_seq_len=entry["context"], dtype=getattr(torch, entry["dtype"]))
        left = 16 * 2**30 - report["parameters"] * {"float32": 4, "bfloat16": 2}[entry["dtype"]]
        assert entry["sequences"] * one <= left < (entry["sequences"] + 1) * one


def test_inspect_fits_nothing_into_less_memory_than_the_weights_take() -> None:
    report = axon("inspect", "random:llama-3.2-1b", "--json", "--memory", "1GiB").json
    assert {entry["sequences"] for entry in report["fits"]} == {0}


@pytest.mark.parametrize("memory", ["9" * 400, "9" * 300 + "TiB", "0", "-1GiB", "nan", "1 KiB"])
def test_inspect_refuses_what_is_no_amount_of_memory(memory: str) -> None:
    result = axon("inspect", "random:tiny", "--memory", memory)
    assert result.code == 2
    assert result.err.startswith("axon: error: ")
    assert "16GiB" in result.err


def test_inspect_shows_the_same_figures_to_people() -> None:
    shown = axon("inspect", "random:llama-3.2-1b").out
    assert "1.24 B parameters" in shown
    assert "32.00 KiB in bfloat16" in shown


def test_inspect_reads_of_a_hub_model_no_more_than_the_headers_of_its_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shipped_folder() / "axon-tiny"
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    tensors = {name: TensorInfo(dtype, list(shape), (0, 0)) for name, (dtype, shape) in tensor_headers(folder).items()}
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)

    def download(repo: str, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith(".safetensors") for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(
        "huggingface_hub.get_safetensors_metadata",
        lambda repo: SafetensorsRepoMetadata(None, False, {}, {"model.safetensors": file}),
    )
    there, here = (axon("inspect", name, "--json").json for name in ("org/name", str(folder)))
    assert there["folder"] == str(tmp_path)
    assert {**there, "model": "", "folder": ""} == {**here, "model": "", "folder": ""}


def test_what_a_model_is_called_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = tmp_path / "[bold]:smile:$^$[" / "INST]"  # markup to a terminal, and to a picture
    odd.parent.mkdir()
    odd.symlink_to(shipped_folder() / "axon-tiny")
    monkeypatch.chdir(tmp_path)
    name = str(odd.relative_to(tmp_path))
    for words in (["inspect", name], ["compare", "-m", name, "--device", "cpu", "-n", "2", "--plot", "picture.svg"]):
        assert axon(*words).out.startswith(f"{name}  ")
    shown = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(loading, "stderr_console", lambda: shown)
    axon("generate", "hello", "-m", name, "--device", "cpu", "-n", "1")
    assert f"loading {name}" in shown.file.getvalue()  # type: ignore[attr-defined]


def compared(*words: str) -> list[str]:
    return ["compare", "hello", *TINY, "-n", "40", *words]


def test_compare_reports_both_runs_position_by_position() -> None:
    report = axon(*compared("--json")).json
    assert report["schema"] == "axon.compare/1"
    assert report["identical"] is True
    assert report["mismatch"] is None
    assert report["cache_bytes_formula"] == report["cache_bytes_allocated"] == 2 * 2 * 2 * 45 * 16 * 4
    assert report["positions"] == [*range(5, 45)]
    for side in ("cached", "uncached"):
        times = report[side]["per_token_s"]
        assert len(times) == 40
        assert report[side]["ttft_s"] == times[0]
        assert report[side]["total_s"] == pytest.approx(sum(times))
        assert isinstance(report[side]["growth_exponent"], float)
    assert report["speedup_total"] == pytest.approx(report["uncached"]["total_s"] / report["cached"]["total_s"])


def test_compare_generates_what_generate_does() -> None:
    generated = axon("generate", "hello", *TINY, *GREEDY, "--dtype", "float32", "-n", "40", "--json").json
    assert axon(*compared("--json")).json["tokens"][: len(generated["tokens"])] == generated["tokens"]


def test_compare_fits_every_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *compared()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "same tokens: 40 of 40" in done.stdout
    assert "growth" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("text", ["[/INST] and on", "[bold]loud[/bold] :smile:"])
def test_compare_shows_the_text_as_it_was_generated(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: text)
    assert axon("compare", "-m", "axon-tiny", "-n", "4", "--device", "cpu").out.splitlines()[-1] == text
    assert text not in axon(*compared()).out  # random weights write none


def test_a_default_answer_is_as_long_as_the_context_allows() -> None:
    shown = axon("generate", "x" * 90, *TINY, "--max-seq-len", "100", "--json", "-t", "0")
    assert shown.code == 0
    assert shown.json["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize(
    "words", [("generate", "hi", "--top-p", "2"), ("chat", "-n", "0"), ("generate", "hi", "-n", "0")]
)
def test_sampling_that_makes_no_sense_is_found_before_a_model_is_loaded(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.loading.load", lambda *_, **__: pytest.fail("loaded"))
    assert axon(*words, *TINY).code == 2


def test_random_weights_have_no_checkpoint_to_quantise(tmp_path: Path) -> None:
    refused = axon("quantize", str(tmp_path / "out"), "-m", "random:tiny")
    assert refused.code == 2
    assert "random:tiny has no checkpoint to quantise" in refused.err


@pytest.mark.parametrize("words", [("generate",), ("keys",), ("keys", "create"), ("serve",)])
def test_every_command_has_its_help_by_the_short_option_too(words: tuple[str, ...]) -> None:
    short, long = axon(*words, "-h"), axon(*words, "--help")
    assert short.code == 0
    assert short.out == long.out
    assert "Usage: axon" in short.out


@pytest.fixture
def disagreeing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the 20th token on, the run without the cache prefers another one by 0.25."""
    step = comparing._uncached_step

    def other(model: object, tokens: list[int]) -> torch.Tensor:
        logits = step(model, tokens)  # type: ignore[arg-type]
        if len(tokens) >= 5 + 20:
            logits = logits.clone()
            logits[0, 7] = logits.max() + 0.25
        return logits

    monkeypatch.setattr(comparing, "_uncached_step", other)


@pytest.mark.usefixtures("disagreeing")
def test_compare_fails_and_shows_where_when_the_tokens_differ() -> None:
    result = axon(*compared("--json"))
    assert result.code == 1
    mismatch = result.json["mismatch"]
    assert (mismatch["index"], mismatch["position"]) == (20, 25)
    assert mismatch["uncached"]["token"] == 7
    assert mismatch["uncached"]["top2_margin"] == pytest.approx(0.25, abs=1e-3)
    assert mismatch["cached"]["token"] != 7
    assert not mismatch["near_tie"], "0.25 is more than rounding"
    shown = axon(*compared())
    assert shown.code == 1
    assert "different tokens from number 21" in shown.out


def test_the_picture_is_sound_svg_with_both_panels(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "picture.svg"
    assert axon(*compared("--plot", str(target))).code == 0
    root = ElementTree.parse(target).getroot()
    assert root.tag.endswith("svg")
    panels = [e for e in root.iter() if (e.get("id") or "").startswith("axes_")]
    assert len(panels) == 2


def test_the_picture_is_png_where_the_name_says_so(tmp_path: Path) -> None:
    target = tmp_path / "picture.PNG"
    assert axon(*compared("--plot", str(target))).code == 0
    assert target.read_bytes().startswith(b"\x89PNG\r\n")


BENCH = ("bench", *TINY, "-p", "16", "-n", "4", "-d", "0", "-d", "32", "-b", "1", "-b", "3", "-r", "2")


def test_bench_measures_every_combination() -> None:
    report = axon(*BENCH, "--json").json
    assert report["schema"] == "axon.bench/1"
    rows = report["rows"]
    assert [(row["test"], row["batch"]) for row in rows] == [
        ("pp16", 1),
        ("tg4", 1),
        ("tg4 @ d32", 1),
        ("tg4", 3),
        ("tg4 @ d32", 3),
    ]
    for row in rows:
        assert row["repetitions"] == 2
        assert row["tokens_per_s_mean"] > 0
        assert row["share_of_ceiling"] > 0
    assert report["read_gb_per_s"] > 0
    assert report["matmul_tflop_per_s"] > 0
    assert {"hardware", "threads", "torch", "axon", "commit", "dtype"} <= report.keys()


def test_bench_as_markdown_and_csv_hold_the_same_rows() -> None:
    markdown = [line for line in axon(*BENCH, "-o", "md").out.splitlines() if line.startswith("|")]
    table = list(csv.DictReader(io.StringIO(axon(*BENCH, "-o", "csv").out)))
    assert [line.split("|")[1].strip() for line in markdown[2:]] == [row["test"] for row in table]
    assert len({line.count("|") for line in markdown}) == 1
    assert all(float(row["tokens_per_s_mean"]) > 0 for row in table)


def test_json_objects_name_their_schema_and_version() -> None:
    for words in (["inspect", "random:tiny"], ["generate", "x", *TINY, "-n", "1"], compared(), list(BENCH)):
        schema = json.loads(axon(*words, "--json").out)["schema"]
        assert schema == f"axon.{words[0]}/1"


ENVIRONMENT = {"schema", "hardware", "threads", "torch", "python", "axon", "commit"}


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "hi", *TINY, "-n", "2"),
        ("compare", "hi", *TINY, "-n", "2"),
        ("inspect",),
        ("bench", *TINY, "-p", "8", "-n", "2", "-d", "0", "-b", "1", "-r", "1"),
    ],
    ids=lambda words: words[0],
)
def test_the_readme_names_every_field_of_the_json(words: tuple[str, ...]) -> None:
    report = axon(*words, "--json").json
    [row] = [
        line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{report['schema']}`")
    ]
    named = set(re.findall(r"`(\w+)`", row))
    assert set(report) - ENVIRONMENT <= named
    for name in ("usage", "timings", "cached", "linears"):
        if isinstance(report.get(name), dict):
            assert set(report[name]) <= named
    for entry in report.get("rows", []):
        assert set(entry) <= named
