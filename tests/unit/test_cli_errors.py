"""Whatever goes wrong at the command line is one clear line, a hint, and the exit code of its kind."""

from __future__ import annotations

import json
import os
import pty
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from axon_llm.checkpoint import random_model
from axon_llm.config import ModelConfig
from axon_llm.errors import ServiceUnavailable
from axon_llm.tokenizer import byte_tokenizer
from cli import main as front
from tests.processes import ended
from tests.unit.terminal import TINY, Result, axon

ROOT = Path(__file__).resolve().parents[2]


def is_one_clear_line(result: Result, code: int) -> bool:
    lines = result.err.splitlines()
    assert result.code == code, result
    assert result.out == ""
    assert lines[0].startswith("axon: error: "), result.err
    assert all(line.startswith("axon: hint: ") for line in lines[1:]), result.err
    assert len(lines) <= 2
    assert "Traceback" not in result.err
    assert "defect" not in result.err
    return True


@pytest.mark.parametrize(
    ("words", "stdin", "says"),
    [
        (("generate", ""), b"", "prompt is empty"),
        (("generate",), b"", "prompt is empty"),
        (("generate", "-"), b"caf\xe9", "not UTF-8 (byte 3)"),
        (("generate", "broken \udc80"), b"", "not UTF-8"),
        (("generate", "x" * 5000), b"", "the context has 2048"),
        (("generate", "hi", "-n", "0"), b"", "max_tokens must be an integer from 1"),
        (("generate", "hi", "-n", "-1"), b"", "max_tokens must be an integer from 1"),
        (("generate", "hi", "-n", "many"), b"", "--max-tokens"),
        (
            ("generate", "hi", "-n", "100000"),
            b"",
            "the prompt has 2 tokens and --max-tokens asks for 100000 more; the context has 2048",
        ),
        (
            ("generate", "hi", "--no-cache", "-n", "100000"),
            b"",
            "the prompt has 2 tokens and --max-tokens asks for 100000 more; the context has 2048",
        ),
        (("generate", "hi", "--max-seq-len", "8", "-n", "8"), b"", "asks for 8 more; the context has 8"),
        (("generate", "hi", "--max-seq-len", "4096"), b"", "from 1 to 2048"),
        (("generate", "hi", "--device", "tpu"), b"", "unknown device 'tpu'"),
        (("generate", "hi", "--device", "cuda:99"), b"", "there is no cuda:99"),
        (("generate", "hi", "--dtype", "int7"), b"", "unknown dtype 'int7'"),
        (("generate", "hi", "--quantize", "int3"), b"", "int3"),
        (("generate", "hi", "-t", "nan"), b"", "temperature"),
        (("generate", "hi", "-t", "-1"), b"", "temperature"),
        (("generate", "hi", "--top-p", "0"), b"", "top_p"),
        (("generate", "hi", "--top-k", "-1"), b"", "top_k"),
        (("generate", "hi", "--min-p", "1.5"), b"", "min_p"),
        (("generate", "hi", "--stop", ""), b"", "stop string"),
        (("generate", "hi", "--max-seq-len", "2"), b"", "the prompt has 2 tokens and --max-tokens asks for 1 more"),
        (("generate", "hi", "--colour"), b"", "--colour"),
        (("generate", "one", "two"), b"", "two"),
        (("generate", "hi", "--no-cache", "--compile"), b"", "--no-cache recomputes"),
        (("compare", ""), b"", "prompt is empty"),
        (("compare", "hi", "-n", "0"), b"", "at least 1"),
        (("compare", "hi", "-n", "5000"), b"", "context of 2048"),
        (("compare", "hi", "--plot", "picture.pdf"), b"", ".svg or .png"),
        (("bench", "-o", "xml"), b"", "xml"),
        (("bench", "-n", "4000"), b"", "context of 2048"),
        (("bench", "-r", "0"), b"", "repetitions"),
        (("bench", "--threads", "100000"), b"", "threads"),
        (("chat", "-n", "0"), b"hi\n", "max_tokens"),
        (("chat",), b"caf\xe9\n", "line 1 of standard input is not UTF-8"),
        (("chat",), b"x" * 5000, "the context holds 2048"),
        (("chat", "--max-seq-len", "5000"), b"hi\n", "from 1 to 2048"),
    ],
)
def test_input_that_makes_no_sense_is_one_line_and_exit_code_2(words: tuple[str, ...], stdin: bytes, says: str) -> None:
    model = () if "--device" in words else ("--device", "cpu")
    result = axon(*words, "-m", "random:tiny", *model, stdin=stdin)
    assert is_one_clear_line(result, 2)
    assert says in result.err


@pytest.mark.parametrize("command", ["generate", "compare", "bench", "chat", "inspect"])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no-such-model", "no model named 'no-such-model'"),
        ("random:no-such-shape", "llama-3.2-1b"),
        (str(Path(__file__).parent), "without a config.json"),
        (__file__, "is a file"),
    ],
)
def test_a_model_that_is_not_there_is_exit_code_3_and_says_what_is(command: str, model: str, says: str) -> None:
    words = {"generate": ["hi"], "compare": ["hi"]}.get(command, [])
    where = [model] if command == "inspect" else ["-m", model]
    result = axon(command, *words, *where, stdin=b"hi\n")
    assert is_one_clear_line(result, 3)
    assert says in result.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint in Hugging Face layout, to be damaged."""
    raw = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    model = random_model(ModelConfig.from_dict(raw), torch.device("cpu"), torch.float32, seed=3)
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in model.state_dict()}
    save_file({names[k]: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer()._backend.to_str())
    return tmp_path


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    match kind:
        case "truncated weights":
            weights.write_bytes(data[:-100])
        case "a header of absurd size":
            weights.write_bytes(struct.pack("<Q", 2**63) + data[8:])
        case "weights that are noise":
            weights.write_bytes(b"\x00" * 1000)
        case "a .bin checkpoint":
            weights.rename(folder / "pytorch_model.bin")
        case "a missing shard":
            index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
            weights.rename(folder / "model-00001-of-00002.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "no weights":
            weights.unlink()
        case "a tokenizer of another model":
            (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
        case "a broken tokenizer":
            (folder / "tokenizer.json").write_text("{")
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "a broken configuration":
            (folder / "config.json").write_text("{")
        case "an unsupported key":
            (folder / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": 30.0}))
        case "an unknown family":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated weights", "model.safetensors"),
        ("a header of absurd size", "model.safetensors"),
        ("weights that are noise", "model.safetensors"),
        ("a .bin checkpoint", "pytorch_model.bin"),
        ("a missing shard", "model-00002-of-00002.safetensors"),
        ("no weights", "no model.safetensors"),
        ("a tokenizer of another model", "100 rows"),
        ("a broken tokenizer", "tokenizer.json"),
        ("no tokenizer", "tokenizer.json"),
        ("a broken configuration", "config.json"),
        ("an unsupported key", "attn_logit_softcapping"),
        ("an unknown family", "gpt2"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_exit_code_3(folder: Path, kind: str, says: str) -> None:
    assert axon("generate", "hi", "-m", str(folder), "-n", "2", "--device", "cpu").code == 0
    damage(folder, kind)
    result = axon("generate", "hi", "-m", str(folder), "-n", "2", "--device", "cpu")
    assert is_one_clear_line(result, 3)
    assert says in result.err


@pytest.mark.parametrize("word", ["generat", "nonsense", "--nonsense"])
def test_an_unknown_command_is_exit_code_2(word: str) -> None:
    assert is_one_clear_line(axon(word), 2)


def test_a_misspelt_command_is_met_with_the_right_one() -> None:
    assert "axon generate" in axon("generat").err


def test_help_about_an_unknown_command_is_exit_code_2() -> None:
    assert is_one_clear_line(axon("help", "nonsense"), 2)


CPU_FULL = (
    "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
)
GPU_FULL = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 1.00 GiB"


def raises(error: BaseException) -> object:
    def command(*_: object) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ServiceUnavailable("no broker at localhost", "Is it running?"), 4, "no broker at localhost"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/root/picture.svg"), 1, "/root/picture.svg: Permission denied"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines"),
        (MemoryError(), 1, "not enough memory\naxon: hint: A smaller --max-seq-len"),
        (RuntimeError(CPU_FULL), 1, "not enough memory for 4096 bytes\naxon: hint: A smaller --max-seq-len"),
        (torch.OutOfMemoryError(GPU_FULL), 1, "not enough memory for 2.50 GiB\naxon: hint: A smaller --max-seq-len"),
        (RuntimeError("mmap: Cannot allocate memory"), 1, "not enough memory\naxon: hint: A smaller --max-seq-len"),
        (OSError(12, "Cannot allocate memory"), 1, "Cannot allocate memory\naxon: hint: A smaller --max-seq-len"),
    ],
)
def test_every_kind_of_failure_has_its_exit_code(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AXON_DEBUG", raising=False)
    monkeypatch.setattr(front, "_run", raises(error))
    result = axon("generate", "hi")
    assert result.code == code
    assert says in result.err
    assert "Traceback" not in result.err


def test_a_defect_shows_its_traceback_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_run", raises(RuntimeError("oh")))
    monkeypatch.delenv("AXON_DEBUG", raising=False)
    assert "AXON_DEBUG=1" in axon("generate", "hi").err
    monkeypatch.setenv("AXON_DEBUG", "1")
    with pytest.raises(RuntimeError, match="oh"):
        axon("generate", "hi")


def process(*words: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,  # type: ignore[call-overload]
    )


def test_a_reader_that_had_enough_makes_no_noise() -> None:
    running = process("generate", "hi", *TINY, "-n", "1500", "-t", "0")
    assert running.stdout is not None
    assert running.stderr is not None
    with ended(running):
        running.stdout.read(3)
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == 0


def without(closed: str, *words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``axon`` from a shell that closes some of its streams, such as ``>&-``."""
    command = f'exec {shlex.quote(sys.executable)} -m cli.main "$@" {closed}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", "-c", command, "axon", *words], cwd=ROOT, env=environment, capture_output=True, check=False
    )


@pytest.mark.parametrize(
    ("closed", "words", "code"),
    [
        (">&-", ("generate", "hi", *TINY, "-n", "2"), 0),
        (">&-", ("inspect", "random:tiny"), 0),
        (">&-", ("--version",), 0),
        (">&-", ("bogus",), 2),
        ("2>&-", ("bogus",), 2),
        (">&- 2>&-", ("bogus",), 2),
        ("<&-", ("chat", *TINY), 0),
        ("<&-", ("generate", *TINY), 2),
        ("<&- >&- 2>&-", ("generate", "hi", *TINY, "-n", "2"), 0),
    ],
)
def test_a_standard_stream_that_is_closed_is_as_if_nobody_read_it(
    closed: str, words: tuple[str, ...], code: int
) -> None:
    done = without(closed, *words)
    assert done.returncode == code, done
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert all(line.startswith(("axon: error: ", "axon: hint: ")) for line in lines), done
    assert bool(lines) == (code != 0 and "2>&-" not in closed)


def test_what_is_opened_later_does_not_take_the_place_of_a_closed_stream() -> None:
    code = (
        "import os; from cli.main import main; main(['--version']); print(min(os.pipe()) > 2, file=os.fdopen(3, 'w'))"
    )
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} 3>&1 <&- >&- 2>&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"True\n"


def test_what_the_terminals_encoding_lacks_is_a_question_mark() -> None:
    for words in (("compare", *TINY, "-n", "4"), ("generate", "hi", *TINY, "-n", "200", "--seed", "1", "-t", "2")):
        done = without("", *words, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert b"?" in done.stdout
        assert done.stdout.isascii()


def test_a_chat_prompts_on_a_terminal_of_any_encoding() -> None:
    master, slave = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "chat", *TINY],
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1", "TERM": "dumb"},
    )
    os.close(slave)
    with ended(running):
        shown = b""
        while b"? " not in shown:  # "›" is none of this encoding's
            shown += os.read(master, 1000)
        os.write(master, b"/exit\n")
        _, err = running.communicate(timeout=120)
    os.close(master)
    assert running.returncode == 0, err
    assert b"error" not in err
