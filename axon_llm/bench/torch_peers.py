"""Peers written in PyTorch, with random weights of our model's shape: transformers with a static cache, and gpt-fast.

Both compile their decode step as their own documentation says, with PyTorch's settings otherwise. Prefills and batches
are left out: what is compared is decode of one sequence, its token read after every step, as a server must. Both are
built as Llama: other biases or norms would be other work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from axon_llm.bench.rows import Case
from axon_llm.config import ModelConfig
from axon_llm.errors import UsageError


class DecodePeer:
    """Measures decode of one sequence, one token after the other; subclasses know how a step is run.

    Args:
        config: dimensions.
        device: where to run.
        cases: what will be measured; decides the cache's length.

    Raises:
        UsageError: the model is not as Llama is.
    """

    version = ""

    def __init__(self, config: ModelConfig, device: torch.device, cases: Sequence[Case]) -> None:
        if config.qkv_bias or config.out_bias or config.mlp_bias or config.qk_norm or any(config.layer_windows):
            raise UsageError(
                f"peers in PyTorch are built as Llama, and family {config.family!r} computes something else",
                "Measure against llama.cpp.",
            )
        self.device = device
        self.length = max(case.depth + case.tokens for case in cases)
        self.rates: dict[Case, list[float]] = {}

    @torch.inference_mode()
    def measure(self, case: Case) -> None:
        """Run one decode case once."""
        if case.kind != "tg" or case.batch != 1:
            return
        self.begin(case.depth)
        self._step(case.depth)  # compiled here, the first time
        start = time.perf_counter()
        for step in range(1, case.tokens):
            self._step(case.depth + step)
        self.rates.setdefault(case, []).append((case.tokens - 1) / (time.perf_counter() - start))

    def _step(self, position: int) -> None:
        token = torch.full((1, 1), 5, device=self.device)
        logits = self.logits(token, torch.tensor([position], device=self.device))
        int(logits.reshape(-1).max(dim=-1).indices)  # the one read of a step, as in our engine

    def begin(self, depth: int) -> None:
        """Put ``depth`` tokens into the cache."""

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """One decode step: token [1, 1] at position [1] → logits of one row."""
        raise NotImplementedError


class TransformersStatic(DecodePeer):
    """transformers with its static cache and a compiled forward.

    Args:
        config: dimensions.
        dtype: of weights and cache.
        device: where to run.
        cases: what will be measured.
        compile: compile the decode step.

    Raises:
        UsageError: transformers is not installed.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        cases: Sequence[Case],
        *,
        compile: bool = True,
    ) -> None:
        super().__init__(config, device, cases)
        try:
            from transformers import LlamaConfig, LlamaForCausalLM, StaticCache, __version__
        except ImportError:
            raise UsageError("transformers is not installed", "pip install 'axon-llm[bench]'.") from None
        self.version = f"transformers {__version__}"
        theirs = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
        )
        torch.manual_seed(0)
        with device:
            fresh: Any = LlamaForCausalLM(theirs)
        self._model = fresh.to(dtype).eval()
        self._cache = StaticCache(config=theirs, max_cache_len=self.length)
        known = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # its name before transformers 5.24
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self._forward: Callable[..., Any] = self._model.forward
        if compile:
            self._forward = torch.compile(self._model.forward, dynamic=False, mode=mode)

    def begin(self, depth: int) -> None:
        """Empty the cache and prefill."""
        self._cache.reset()
        if depth:
            tokens = torch.zeros(1, depth, dtype=torch.int64, device=self.device)
            self._run(self._model.forward, tokens, torch.arange(depth, device=self.device))

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """One step through the compiled forward."""
        return self._run(self._forward, token, position)

    def _run(self, forward: Callable[..., Any], tokens: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = forward(
            input_ids=tokens, position_ids=positions[None], use_cache=True, **{self._cache_name: self._cache},
            logits_to_keep=1,
        ).logits  # fmt: skip
        return found


class GptFast(DecodePeer):
    """gpt-fast's model, from a folder that holds its ``model.py``; its own compile settings.

    Args:
        folder: a checkout of gpt-fast.
        config: dimensions; ``head_dim`` must be ``hidden_size / num_heads``.
        dtype: of weights and cache.
        device: where to run.
        cases: what will be measured.
        compile: compile the decode step.

    Raises:
        UsageError: the folder holds no ``model.py``, or gpt-fast cannot express the shape.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        cases: Sequence[Case],
        *,
        compile: bool = True,
    ) -> None:
        super().__init__(config, device, cases)
        if not (folder / "model.py").is_file():
            raise UsageError(f"there is no model.py in {folder}", "--against gpt-fast:FOLDER takes a checkout of it.")
        if config.head_dim * config.num_heads != config.hidden_size:
            raise UsageError("gpt-fast has no head_dim of its own; this shape needs one")
        digest = hashlib.sha256((folder / "model.py").read_bytes()).hexdigest()
        self.version = f"gpt-fast (model.py {digest[:12]})"
        spec = importlib.util.spec_from_file_location("gpt_fast_model", folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["gpt_fast_model"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        arguments = module.ModelArgs(
            block_size=self.length, vocab_size=config.vocab_size, n_layer=config.num_layers, n_head=config.num_heads,
            dim=config.hidden_size, intermediate_size=config.intermediate_size, n_local_heads=config.num_kv_heads,
            rope_base=config.rope.theta, norm_eps=config.norm_eps,
        )  # fmt: skip
        torch.manual_seed(0)
        with device:
            model = module.Transformer(arguments).to(dtype).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.02)
            model.setup_caches(max_batch_size=1, max_seq_length=self.length)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.normal_()

        step = _with_block_mask(model) if "mask" in inspect.signature(model.forward).parameters else model
        # As its generate.py does: CUDA graphs, and on a GPU a search for each kernel's best sizes.
        options: dict[str, Any] = {"triton.cudagraphs": True, "coordinate_descent_tuning": device.type == "cuda"}
        self._step_compiled = torch.compile(step, options=options, fullgraph=True) if compile else step

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """One step; what is in the cache has no bearing on speed."""
        found: Tensor = self._step_compiled(token, position)
        return found


def _with_block_mask(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A decode step of gpt-fast since it uses flex attention: it takes a row of a mask of blocks that is made once."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = model.max_seq_length
    device = model.output.weight.device
    whole: Any = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, length, length, device=device)

    def step(token: Tensor, position: Tensor) -> Tensor:
        mask = whole[:, :, position // whole.BLOCK_SIZE[0]]
        mask.mask_mod, mask.seq_lengths = whole.mask_mod, (1, length)
        found: Tensor = model(mask, token, position)
        return found

    return step
