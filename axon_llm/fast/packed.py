"""Checkpoints whose linear layers are stored quantised: loading is a copy at most, and not half a minute of work.

A packed checkpoint is a model folder like any other: ``config.json`` (with a marker, ``axon_packed``), safetensors,
tokenizer files. Its linears are stored fused, under the names of the fast model:

* int8: ``NAME.strips`` int32 ``[⌈N / 16⌉, W, 16]`` and ``NAME.scale`` float32 ``[N]``;
* int4: ``NAME.strips``, which hold the scales too;

in the layout that the CPU kernels read (``strips.py``). A device that wants another converts when it loads.

Embedding, norms and biases are stored as they were. ``NAME.bias`` where there is one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from axon_llm.checkpoint import DTYPES, load_model, opened, resolve_dtype, stored_dtype, tensor_files, without_memory
from axon_llm.config import ModelConfig
from axon_llm.errors import CheckpointError, UsageError
from axon_llm.fast import pages
from axon_llm.fast.attention import fastest_attention
from axon_llm.fast.quantise import GROUP
from axon_llm.fast.replace import build, fuse, join, plan_for, quantised, stack
from axon_llm.fast.strips import BLOCK, LANES, Int4Strips, Int8Strips, lay_int4, lay_int8, read_int4, read_int8
from axon_llm.model import Transformer

VERSION = 2
_CARRIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
_KINDS = ("int8", "int4")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def write_packed(source: Path, target: Path, quantize: str) -> int:
    """Quantise the checkpoint in one folder into another.

    Args:
        source: a model folder with float weights.
        target: created; must not exist, or be empty.
        quantize: ``"int8"`` or ``"int4"``.

    Returns:
        Bytes of the tensors written.

    Raises:
        ModelError: the source cannot be read, or is packed already; the target cannot be written.
        UsageError: the target holds something, input channels cannot be grouped, or the quantisation is not known.
    """
    if quantize not in _KINDS:
        raise UsageError(f"a checkpoint cannot be packed as {quantize!r}", f"Known: {', '.join(_KINDS)}.")
    config = ModelConfig.from_file(source / "config.json")
    if config.packed:
        raise CheckpointError(f"{source} is packed already ({config.packed})", "Start from the original checkpoint.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not an empty folder", "Name a new folder.")
    stored = DTYPES.get(stored_dtype(source, config))  # float16, too, though a CPU would compute in float32
    model = load_model(source, config, torch.device("cpu"), stored)
    tensors: dict[str, Tensor] = {}

    def keep(name: str, linears: list[nn.Linear]) -> nn.Module:
        values = quantised(quantize, linears)
        if quantize == "int8":
            tensors[f"{name}.strips"], tensors[f"{name}.scale"] = lay_int8(values[0]), values[1]
        else:
            tensors[f"{name}.strips"] = lay_int4(values[0], values[1], values[2])
        bias = stack([linear.bias for linear in linears])
        if bias is not None:
            tensors[f"{name}.bias"] = bias
        return nn.Identity()

    fuse(model, keep)
    tensors |= {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    fresh = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        _write(source, target, quantize, tensors)
    except BaseException:  # interrupted, or the disk is full: half a checkpoint is none, and would be in the way
        for path in target.iterdir():
            path.unlink()
        if fresh:
            target.rmdir()
        raise
    return sum(tensor.nbytes for tensor in tensors.values())


def _write(source: Path, target: Path, quantize: str, tensors: dict[str, Tensor]) -> None:
    """The files of a packed checkpoint; what makes it one comes last."""
    try:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from None
    (target / "model.safetensors").chmod(0o644)  # written for its owner alone, unlike every other file
    for path in (*(source / name for name in _CARRIED), *source.glob("*.jinja")):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["axon_packed"] = {"version": VERSION, "weights": quantize}
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def load_packed(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    *,
    mapped: bool = False,
) -> Transformer:
    """Load a packed checkpoint. The result is what ``accelerate`` would have made of the original.

    Args:
        folder: the checkpoint.
        config: read from it.
        device: where to.
        dtype: of activations, embedding and norms; as stored when omitted.
        quantize: ``None``, or what the checkpoint is.
        mapped: leave the weights where the file is mapped, on small pages: for a process that answers once.

    Raises:
        CheckpointError: tensors missing, extra, wrongly shaped, or of another type.
        UsageError: another quantisation was asked for.
    """
    if quantize not in (None, config.packed):
        raise UsageError(
            f"{folder} is packed as {config.packed} and cannot become {quantize}", "Start from the original checkpoint."
        )
    stored = _Stored(folder)
    embedding = str(stored.peek("embed_tokens.weight").dtype).removeprefix("torch.")
    target = resolve_dtype(dtype, embedding, device)
    plan = plan_for(device, target, config.packed)

    def make(name: str, linears: list[nn.Linear]) -> nn.Module:
        n, k = sum(linear.out_features for linear in linears), linears[0].in_features
        has_bias = linears[0].bias is not None
        bias = stored.take(f"{name}.bias", (n,), _FLOATS).to(device, target) if has_bias else None
        words = 5 * k // GROUP if config.packed == "int4" else -(-k // 4)
        block = BLOCK[config.packed]
        strips = stored.take(f"{name}.strips", (-(-n // LANES), -(-words // block) * block, LANES), (torch.int32,))
        if plan.kernel.endswith("-strips") and not mapped:
            strips = pages.weights.copy(strips)
        if config.packed == "int4":
            if plan.kernel == "int4-strips":
                return Int4Strips(strips, k, n, bias)
            values: tuple[Tensor, ...] = read_int4(strips, n, k)
        else:
            scale = stored.take(f"{name}.scale", (n,), (torch.float32,))
            if plan.kernel == "int8-strips":
                return Int8Strips(strips, scale, k, bias)
            values = read_int8(strips, n, k), scale
        return build(plan.kernel, tuple(value.to(device) for value in values), bias)

    model = fuse(without_memory(config), make, fastest_attention(device, target))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = stored.take(name, tuple(parameter.shape), _FLOATS).to(device, target)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    stored.finish()
    model.rope.to(device)
    return join(model.eval().requires_grad_(False))


class _Stored:
    """The tensors in a folder's files, each taken once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._home = {name: path for path in tensor_files(folder) for name in _names(path)}

    def peek(self, name: str) -> Tensor:
        """A tensor, mapped from its file. Each is mapped anew: what was read from a mapping counts as memory in use."""
        if name not in self._home:
            raise CheckpointError(f"{self._folder} lacks {name}", "Do config.json and the weights belong together?")
        with opened(self._home[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def take(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """A tensor of this shape, and one of these types: kernels read bytes without asking."""
        tensor = self.peek(name)
        del self._home[name]
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(f"{self._folder}: {name} is {tensor.dtype}, should be {wanted}")
        if tensor.shape != shape:
            raise CheckpointError(f"{self._folder}: {name} is {list(tensor.shape)}, should be {list(shape)}")
        return tensor

    def finish(self) -> None:
        """Everything has been taken."""
        if self._home:
            raise CheckpointError(f"{self._folder} holds unexpected {', '.join(sorted(self._home)[:3])}")


def _names(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())
