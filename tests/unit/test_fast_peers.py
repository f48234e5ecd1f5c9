"""Writing weights for a peer, running it, and the ratios: with a stand-in for llama-bench."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from axon_llm.bench import llama_cpp
from axon_llm.bench.llama_cpp import LlamaBench, kept_gguf, write_gguf
from axon_llm.bench.peers import ratios
from axon_llm.bench.quality import compare
from axon_llm.bench.rows import Case, Row
from axon_llm.bench.torch_peers import GptFast, TransformersStatic
from axon_llm.checkpoint import random_model
from axon_llm.config import ModelConfig
from axon_llm.errors import AxonError, UsageError
from axon_llm.shapes import SHAPES, shape_config
from tests.needs import need_module

CASE = Case("tg", 4, depth=8)


def program(folder: Path, body: str) -> str:
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_peer_is_called_with_the_case_and_its_rate_is_kept(tmp_path: Path) -> None:
    body = "import sys, json; print(json.dumps([{'avg_ts': 5.0 if '-d 8' in ' '.join(sys.argv) else 0}]))"
    peer = LlamaBench(program(tmp_path, body), tmp_path / "x.gguf", threads=2)
    peer.measure(CASE)
    peer.measure(Case("tg", 4, batch=8))  # llama-batched-bench is not there
    assert peer.rates == {CASE: [5.0]}


def test_several_sequences_are_measured_with_the_program_for_them(tmp_path: Path) -> None:
    body = "import sys, json; print('some log'); print(json.dumps({'speed_tg': 7.0 if '96' in sys.argv else 0}))"
    (tmp_path / "llama-bench").touch()
    Path(program(tmp_path, body)).rename(tmp_path / "llama-batched-bench")
    peer = LlamaBench(str(tmp_path / "llama-bench"), tmp_path / "x.gguf", threads=2)
    case = Case("tg", 4, depth=8, batch=8)  # a context of 8 × 12
    peer.measure(case)
    assert peer.rates == {case: [7.0]}


def test_a_peer_that_fails_says_what_it_said(tmp_path: Path) -> None:
    peer = LlamaBench(program(tmp_path, "import sys; sys.exit('no such instruction')"), tmp_path / "x.gguf", 2)
    with pytest.raises(AxonError, match="no such instruction"):
        peer.measure(CASE)


def test_a_missing_program_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="llama-bench"):
        LlamaBench.find(str(tmp_path / "llama-bench"))


def test_ratios_pair_repetitions_and_leave_out_the_warm_up() -> None:
    peer = LlamaBench("", Path(), 1, {CASE: [999.0, 2.0, 4.0, 8.0]})
    row = Row(CASE, 1.0, 0.0, seconds=[1.0, 1.0, 1.0])  # 4 tokens/s
    (report,) = ratios("llama.cpp", peer, [row, Row(Case("pp", 1), 0.0, 1.0, [1.0])])
    assert (report["ratio_median"], report["ratio_min"], report["ratio_max"]) == (1.0, 0.5, 2.0)
    assert report["tokens_per_s_median"] == 4.0


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_a_gguf_holds_the_weights(tmp_path: Path, kind: str) -> None:
    gguf = need_module("gguf")
    config = ModelConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = random_model(config, torch.device("cpu"), torch.bfloat16)
    write_gguf(model, tmp_path / "x.gguf", kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert len(tensors) == 2 + 9 * config.num_layers
    stored = tensors["blk.1.ffn_down.weight"]
    back = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    exact = model.layers[1].mlp.down_proj.weight.float()
    assert float((back - exact).norm() / exact.norm()) < {"BF16": 1e-6, "Q8_0": 0.01, "Q4_0": 0.12}[kind]


def test_a_gguf_of_another_family_is_refused(tmp_path: Path) -> None:
    need_module("gguf")
    model = random_model(shape_config("tiny"), torch.device("cpu"), torch.bfloat16)
    object.__setattr__(model.config, "family", "qwen3")
    with pytest.raises(UsageError, match="qwen3"):
        write_gguf(model, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("family", "architecture", "more"),
    [
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": 24}),
        ("mistral", "llama", {"sliding_window": None}),
        ("llama", "llama", {"head_dim": 24}),
    ],
)
def test_a_gguf_has_what_its_family_computes_with(
    tmp_path: Path, family: str, architecture: str, more: dict[str, Any]
) -> None:
    gguf = need_module("gguf")
    raw = {**SHAPES["tiny"], "model_type": family, "hidden_size": 64, **more}
    config = ModelConfig.from_dict(raw)
    model = random_model(config, torch.device("cpu"), torch.bfloat16)
    write_gguf(model, tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("general.architecture").contents() == architecture
    lengths = [reader.get_field(f"{architecture}.attention.{name}_length") for name in ("key", "value")]
    assert [field and field.contents() for field in lengths] == [more.get("head_dim")] * 2
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    attention = model.layers[1].self_attn
    biases = {f"attn_{letter}.bias": getattr(attention, f"{letter}_proj").bias for letter in "qkv"}
    norms = {f"attn_{letter}_norm.weight": getattr(attention, f"{letter}_norm") for letter in "qk"}
    expected = biases if family == "qwen2" else {}
    expected |= {name: norm.weight for name, norm in norms.items()} if family == "qwen3" else {}
    for name, weight in expected.items():
        assert torch.equal(tensors[f"blk.1.{name}"], weight.float()), name
    assert len(tensors) == 2 + (9 + len(expected)) * config.num_layers


def test_a_gguf_of_a_model_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    need_module("gguf")
    config = ModelConfig.from_dict({**SHAPES["tiny"], "model_type": "mistral", "sliding_window": 16})
    with pytest.raises(UsageError, match="mistral"):
        write_gguf(random_model(config, torch.device("cpu"), torch.bfloat16), tmp_path / "x.gguf")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were written as GGUF, each file holding its model's name."""
    names: list[str] = []

    def write(model: Any, path: Path, kind: str) -> None:
        path.write_text(model)
        names.append(model)

    monkeypatch.setattr(llama_cpp, "load", lambda name, device: (name, None))
    monkeypatch.setattr(llama_cpp, "write_gguf", write)
    return names


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_gguf_is_written_once_for_a_shape_and_a_precision(tmp_path: Path, written: list[str]) -> None:
    folder = tmp_path / "kept"
    first = kept_gguf("random:tiny", "Q8_0", folder)
    assert kept_gguf("random:TINY", "Q8_0", folder) == first
    assert written == ["random:tiny"]
    assert len({first, kept_gguf("random:tiny", "Q4_0", folder), kept_gguf("random:llama-2-7b", "Q8_0", folder)}) == 3
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_gguf_is_of_the_folder_that_is_meant_and_of_what_is_in_it_now(
    tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    for parent in ("one", "other"):
        checkpoint(tmp_path / parent / "model")
        monkeypatch.chdir(tmp_path / parent)
        kept.append(kept_gguf("model", folder=tmp_path / "kept"))
    assert kept_gguf(str(tmp_path / "one" / "model"), folder=tmp_path / "kept") == kept[0]
    (tmp_path / "one" / "model" / "model.safetensors").write_bytes(b"other weights")
    kept.append(kept_gguf(str(tmp_path / "one" / "model"), folder=tmp_path / "kept"))
    assert len(set(kept)) == len(written) == 3


def test_a_gguf_that_was_not_written_to_its_end_is_not_used(
    tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: Any, path: Path, kind: str) -> None:
        path.write_text("the first half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llama_cpp, "write_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept_gguf("random:tiny", folder=tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []
    assert kept_gguf("random:tiny", folder=tmp_path / "kept").read_text() == "random:tiny"


def test_a_gguf_is_not_taken_from_a_folder_that_others_may_write_to(tmp_path: Path, written: list[str]) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="others may write"):
        kept_gguf("random:tiny", folder=tmp_path)
    assert written == []


def test_quality_figures_are_zero_for_the_same_logits_and_grow_with_the_error() -> None:
    exact = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    same = compare(exact, exact)
    assert same == {"relative_error": 0.0, "same_likeliest": 1.0, "kl_nats": 0.0}
    off = compare(exact, exact.flip(-1))
    assert off["kl_nats"] > 0.1
    assert off["same_likeliest"] < 1


@pytest.mark.parametrize(("before", "expected"), [("", "True 1"), ("import torch;", "False 1")])
def test_huge_pages_are_asked_for_before_torch_is_imported(before: str, expected: str) -> None:
    code = f"{before}import os; from axon_llm.fast.memory import prefer_huge_pages; "
    code += "print(prefer_huge_pages(), os.environ['THP_MEM_ALLOC_ENABLE'])"
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == expected


def test_a_setting_of_the_user_is_left_alone() -> None:
    code = "from axon_llm.fast.memory import prefer_huge_pages; print(prefer_huge_pages())"
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("before", "left_alone"), [("", True), ("import torch;", False)])
def test_garbage_is_not_looked_for_while_torch_is_imported_and_is_afterwards(before: str, left_alone: bool) -> None:
    code = f"{before}import gc\nfrom axon_llm.fast.memory import made_to_stay\n"
    code += "with made_to_stay():\n import torch; within = gc.isenabled()\n"
    code += "print(within, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(not left_alone), "True", str(left_alone)]


GPT_FAST = """
from dataclasses import dataclass
import torch
@dataclass
class ModelArgs:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; dim: int
    intermediate_size: int; n_local_heads: int; rope_base: float; norm_eps: float
class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embedding = torch.nn.Embedding(args.vocab_size, args.dim)
    def setup_caches(self, max_batch_size, max_seq_length):
        self.register_buffer("cache", torch.zeros(max_batch_size, max_seq_length))
    def forward(self, token, position):
        return self.embedding(token) @ self.embedding.weight.T + self.cache[0, position]
"""


def test_peers_in_pytorch_decode_and_are_timed(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GPT_FAST)
    config, where = shape_config("tiny"), torch.device("cpu")
    peers = [
        GptFast(tmp_path, config, torch.float32, where, [CASE], compile=False),
        TransformersStatic(config, torch.float32, where, [CASE], compile=False),
    ]
    for peer in peers:
        peer.measure(CASE)
        peer.measure(Case("pp", 8))
        assert list(peer.rates) == [CASE]
        assert peer.rates[CASE][0] > 0


def test_a_folder_without_gpt_fast_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.py"):
        GptFast(tmp_path, shape_config("tiny"), torch.float32, torch.device("cpu"), [CASE])
