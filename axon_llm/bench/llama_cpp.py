"""llama.cpp as a peer: weights of a shape as GGUF, and its own programs to measure them.

``llama-bench`` is looked for on the PATH, or given by option; ``llama-batched-bench`` beside it. The ``gguf`` package
comes with the ``bench`` extra. What it wrote is kept in ``~/.cache/axon/gguf``, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from axon_llm import __version__
from axon_llm.bench.rows import Case
from axon_llm.checkpoint import load
from axon_llm.errors import AxonError, UsageError
from axon_llm.fast import native
from axon_llm.locate import WEIGHT_FILES, locate
from axon_llm.model import Transformer
from axon_llm.shapes import PREFIX

TYPES = ("BF16", "Q8_0", "Q4_0")
# Our family → llama.cpp's architecture, which computes the same; it has none of its own for Mistral.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(slots=True)
class LlamaBench:
    """llama.cpp on one GGUF file.

    Attributes:
        program: path of ``llama-bench``.
        gguf: the weights.
        threads: to use.
        rates: tokens per second, a list for each case.
        version: as ``llama-bench`` gives it with its first result.
    """

    program: str
    gguf: Path
    threads: int
    rates: dict[Case, list[float]] = field(default_factory=dict)
    version: str = ""

    @staticmethod
    def find(given: str | None) -> str:
        """The program's path.

        Raises:
            UsageError: there is none.
        """
        found = shutil.which(given or "llama-bench")
        if found is None:
            raise UsageError(
                f"there is no {given or 'llama-bench on the PATH'}", "Build llama.cpp, or name it: --llama-bench PATH."
            )
        return found

    def measure(self, case: Case) -> None:
        """Run one case once: several sequences with llama-batched-bench, left out where that is missing.

        Raises:
            AxonError: the program failed; the message ends with what it said last.
        """
        common = ["-m", str(self.gguf), "-t", str(self.threads), "-ngl", "0"]
        if case.batch == 1:
            count = ["-p", str(case.tokens), "-n", "0"] if case.kind == "pp" else ["-p", "0", "-n", str(case.tokens)]
            command = [self.program, *common, *count, "-r", "1", "-o", "json", "-d", str(case.depth)]
        else:
            program = shutil.which(str(Path(self.program).with_name("llama-batched-bench")))
            if program is None:
                return
            depth = max(case.depth, 1)  # it wants a prompt
            context = case.batch * (depth + case.tokens)
            sizes = ["-npp", str(depth), "-ntg", str(case.tokens), "-npl", str(case.batch), "-c", str(context)]
            command = [program, *common, *sizes, "-tb", str(self.threads), "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        try:
            if case.batch == 1:
                found = json.loads(done.stdout)[0]
                rate = float(found["avg_ts"])
                self.version = f"llama.cpp {found.get('build_commit', '')} (build {found.get('build_number', '?')})"
            else:
                rate = float(json.loads(done.stdout.strip().splitlines()[-1])["speed_tg"])
        except (ValueError, LookupError):
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise AxonError(f"{command[0]} failed with exit code {done.returncode}: {last}") from None
        self.rates.setdefault(case, []).append(rate)


def kept_gguf(name: str, kind: str = "BF16", folder: Path | None = None) -> Path:
    """A model as GGUF, written the first time and kept under a name that changes with the model's files.

    Args:
        name: of the model, as :func:`axon_llm.checkpoint.load` takes it.
        kind: one of :data:`TYPES`.
        folder: where it is kept; ``~/.cache/axon/gguf``, which is the user's own, if not given.

    Raises:
        UsageError: see :func:`write_gguf`, or the folder is somebody else's.
        ModelNotFound: there is no such model.
    """
    folder = folder or native.user_cache() / "gguf"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UsageError(f"{folder} belongs to somebody else, or others may write to it", f"Try: chmod 700 {folder}")
    path = folder / f"{_key(name)}-{kind}.gguf"
    if not path.is_file():
        # Under its name only when it is whole: what an interrupted run leaves behind is never taken for the weights.
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            write_gguf(load(name, device="cpu")[0], Path(unfinished) / path.name, kind)
            (Path(unfinished) / path.name).replace(path)
    return path


def _key(name: str) -> str:
    """A file name for a model: its last part, to be recognised by, and a digest of what the weights depend on."""
    parts = [__version__]
    if name.startswith(PREFIX):
        last = name.removeprefix(PREFIX).lower()
        parts.append(PREFIX + last)
    else:
        folder = locate(name).resolve()
        last = folder.name
        parts.append(str(folder))
        for path in sorted({folder / "config.json", *(file for glob in WEIGHT_FILES for file in folder.glob(glob))}):
            status = path.stat()
            parts.append(f"{path.name} {status.st_mtime_ns} {status.st_size}")
    return f"{last}-{hashlib.sha256(chr(0).join(parts).encode(errors='surrogateescape')).hexdigest()[:16]}"


def write_gguf(model: Transformer, path: Path, kind: str = "BF16") -> None:
    """Write a model as GGUF, without a tokenizer.

    Query and key rows are not permuted to llama.cpp's pairing of rotary channels: the file is for speed, not for text.

    Args:
        model: not accelerated yet.
        path: file to write.
        kind: one of :data:`TYPES`.

    Raises:
        UsageError: the ``gguf`` package is missing, or llama.cpp computes something else than the model: other biases
            than its architecture has, or a sliding window.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("the gguf package is not installed", "pip install 'axon-llm[bench]'.") from None
    config = model.config
    architecture = ARCHITECTURES.get(config.family)
    if config.qkv_bias != (architecture == "qwen2") or config.qk_norm != (architecture == "qwen3"):
        architecture = None
    if architecture is None or config.out_bias or config.mlp_bias or any(config.layer_windows):
        raise UsageError(
            f"a GGUF of this model (family {config.family!r}) cannot be written",
            f"Families: {', '.join(ARCHITECTURES)}; without a sliding window, and with no other biases than Qwen2's.",
        )
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if architecture == "qwen3" or config.head_dim * config.num_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _gguf_tensors(model):
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().numpy())
            continue
        if kind != "BF16" and tensor.shape[1] % 32:
            raise UsageError(f"{kind} needs input channels in groups of 32; {name} has {tensor.shape[1]}")
        target = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    yield "token_embd.weight", model.embed_tokens.weight
    yield "output_norm.weight", model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    blocks: Any = model.layers  # of Block; the container does not say so
    for index, block in enumerate(blocks):
        yield f"blk.{index}.attn_norm.weight", block.input_layernorm.weight
        yield f"blk.{index}.ffn_norm.weight", block.post_attention_layernorm.weight
        for ours, theirs in _NAMES.items():
            linear = block.get_submodule(ours)
            yield f"blk.{index}.{theirs}.weight", linear.weight
            if linear.bias is not None:
                yield f"blk.{index}.{theirs}.bias", linear.bias
        if model.config.qk_norm:
            yield f"blk.{index}.attn_q_norm.weight", block.self_attn.q_norm.weight
            yield f"blk.{index}.attn_k_norm.weight", block.self_attn.k_norm.weight
