"""Weights from safetensors files into a model: strict in both directions, memory-mapped, straight to dtype and device.

The model is built without memory (on PyTorch's "meta" device) and each tensor is put in its place: mapped from the file
where dtype and device are already right, converted one at a time where not. So the peak is the weights themselves.

safetensors only: a ``.bin`` or ``.pt`` file is a pickle, and unpickling runs whatever program is in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from axon_llm.config import ModelConfig
from axon_llm.errors import CheckpointError, UsageError
from axon_llm.locate import locate
from axon_llm.model import Transformer
from axon_llm.shapes import PREFIX, shape_config
from axon_llm.tokenizer import Tokenizer, byte_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDEX = "model.safetensors.index.json"
_LEFTOVERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.masked_bias")


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    seed: int = 0,
    mapped: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        name: a folder, the name of a shipped model, a Hub id, or ``random:SHAPE`` for random weights of a named shape.
        device: such as ``"cuda"``; a GPU if there is one, else the CPU, when omitted.
        dtype: of the weights; the checkpoint's own when omitted.
        quantize: ``"int8"``, ``"int4"`` or (on a GPU) ``"fp8"`` replaces the linear layers (see ``axon_llm.fast``).
        seed: of random weights.
        mapped: leave a packed checkpoint's weights where its file is mapped: ready sooner, and slower to read.

    Returns:
        The model in evaluation mode, without gradients, and the tokenizer.

    Raises:
        ModelError: not found, unreadable, unsupported or incomplete.
        UsageError: unknown device or dtype.
    """
    where = resolve_device(device)
    if str(name).startswith(PREFIX):
        config = shape_config(str(name))
        model, tokenizer = (
            random_model(config, where, resolve_dtype(dtype, config.dtype, where), seed),
            byte_tokenizer(),
        )
    else:
        folder = locate(name)
        config = ModelConfig.from_file(folder / "config.json")
        tokenizer = Tokenizer.from_folder(folder, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        if config.packed:
            from axon_llm.fast.packed import load_packed

            return load_packed(folder, config, where, dtype, quantize, mapped=mapped), tokenizer
        model = load_model(folder, config, where, dtype)
    if quantize is not None:
        from axon_llm.fast import accelerate

        model = accelerate(model, quantize)
    return model, tokenizer


def load_model(
    folder: Path, config: ModelConfig, device: torch.device, dtype: str | torch.dtype | None = None
) -> Transformer:
    """Load the weights in ``folder`` into a model of ``config``.

    Raises:
        CheckpointError: files or tensors missing, extra, wrongly shaped, damaged, or not safetensors.
    """
    files = tensor_files(folder)
    model = without_memory(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]  # a copy in the file, if any, is not read: the embedding is the output layer
    wanted = _match(folder, files, expected, config)
    target = resolve_dtype(dtype, stored_dtype(folder, config), device)
    state: dict[str, Tensor] = {}
    for path, names in wanted.items():
        state |= {name: _read(path, stored_name, device, target) for name, stored_name in names.items()}
    if config.tie_word_embeddings:
        _check_tied_copy(folder, files)
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    return _ready(model, device)


def _read(path: Path, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One tensor: mapped where it can be used as it lies in the file, else a converted copy.

    The file is opened anew for each, because closing it unmaps the pages that were read: otherwise a conversion would
    hold the file in memory besides its result.
    """
    with opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
        if tensor.dtype == dtype and device.type == "cpu":
            return tensor
        return tensor.to(device=device, dtype=dtype, copy=True)


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        CheckpointError: none, or some are missing; other formats are named and refused.
    """
    # First, as transformers does: a checkpoint saved over a sharded one replaces the shards and leaves their index.
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}",
                "The download may be incomplete.",
            )
        return [folder / name for name in names]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"))
    if others:
        raise CheckpointError(
            f"{folder} holds {others[0]} but no model.safetensors",
            "Axon reads safetensors only: the other formats can run code or need a conversion.",
        )
    raise CheckpointError(f"{folder} holds no model.safetensors and no {_INDEX}")


def tensor_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype as safetensors calls it, shape) of every tensor, from the files' headers alone."""
    headers = {}
    for path in tensor_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                part = file.get_slice(name)
                headers[name] = (part.get_dtype(), tuple(part.get_shape()))
    return headers


def stored_dtype(folder: Path, config: ModelConfig) -> str:
    """The type a checkpoint is stored in, by its own name: what ``config.json`` says, else that of the first weight."""
    if config.dtype:
        return config.dtype
    headers = tensor_headers(folder).items()
    return next((_FLOATS[kind] for name, (kind, _) in headers if kind in _FLOATS and not name.endswith(_LEFTOVERS)), "")


def _match(
    folder: Path, files: list[Path], expected: dict[str, torch.Size], config: ModelConfig
) -> dict[Path, dict[str, str]]:
    """Which file holds which of the expected tensors under which name; everything that does not match is an error."""
    wanted: dict[Path, dict[str, str]] = {}
    found: set[str] = set()
    extra, misshapen = [], []
    for path in files:
        with opened(path) as file:
            for stored_name in file.keys():  # noqa: SIM118 - not a dictionary
                name = stored_name.removeprefix("model.")
                if name.endswith(_LEFTOVERS) or (name == "lm_head.weight" and config.tie_word_embeddings):
                    continue
                if name not in expected:
                    extra.append(stored_name)
                    continue
                if name in found:
                    raise CheckpointError(f"{folder} holds {stored_name} more than once")
                part = file.get_slice(stored_name)
                if part.get_dtype() not in _FLOATS:
                    raise CheckpointError(
                        f"{path}: {stored_name} is stored as {part.get_dtype()}, which is not supported",
                        f"Supported: {', '.join(_FLOATS)}.",
                    )
                shape = tuple(part.get_shape())
                if shape != tuple(expected[name]):
                    misshapen.append(f"{stored_name} is {list(shape)}, should be {list(expected[name])}")
                found.add(name)
                wanted.setdefault(path, {})[name] = stored_name
    missing = sorted(expected.keys() - found)
    for what, names in (("lacks", missing), ("holds unexpected", extra), ("has misshapen tensors:", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder} {what} {', '.join(names[:3])}{more}", "Do config.json and the weights belong together?"
            )
    return wanted


def _check_tied_copy(folder: Path, files: list[Path]) -> None:
    """Raise CheckpointError if an output layer that should be the embedding's copy is another matrix.

    Some rows tell: reading both matrices would put the largest tensor into memory a second time.
    """
    rows: dict[str, list[Tensor]] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name in ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight"):
                    part = file.get_slice(name)
                    count = part.get_shape()[0]
                    rows[name] = [part[row : row + 1].clone() for row in range(0, count, max(1, count // 64))]
    copy = rows.pop("lm_head.weight", None)
    if copy is not None and any(len(copy) != len(own) or not all(map(torch.equal, copy, own)) for own in rows.values()):
        raise CheckpointError(
            f"{folder} ties its output layer to the embedding, but holds another lm_head.weight",
            "tie_word_embeddings in config.json is wrong, or that tensor does not belong there.",
        )


_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading; what is wrong with it is a CheckpointError."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a sound safetensors file: {error}", "It may be truncated or damaged; download it again."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """A model of ``config`` with random weights: normal with standard deviation 0.02, norms 1, biases random too.

    The numbers are drawn once into a pool of some millions, whose size is prime, and repeated from there: filling
    a billion weights one draw at a time would take longer than the measurement that wants them.
    """
    model = without_memory(config)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    pool = (torch.randn(4_194_301, generator=generator) * 0.02).to(device=device, dtype=dtype)
    state: dict[str, Tensor] = {}
    offset = 0
    for name, meta in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            state[name] = state["embed_tokens.weight"]
            continue
        if "norm" in name:
            state[name] = torch.ones(meta.shape, device=device, dtype=dtype)
            continue
        flat = torch.empty(meta.numel(), device=device, dtype=dtype)
        filled = 0
        while filled < flat.numel():
            count = min(flat.numel() - filled, pool.numel() - offset)
            flat[filled : filled + count] = pool[offset : offset + count]
            filled, offset = filled + count, (offset + count) % pool.numel()
        state[name] = flat.view(meta.shape)
    model.load_state_dict(state, assign=True)
    return _ready(model, device)


class _SkipRandomInit(TorchFunctionMode):
    """Leaves tensors alone where modules would fill them with random numbers.

    Not only a saving: on the "meta" device those calls import a symbolic-mathematics library, two seconds and 75 MB.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, unless it comes from ``torch.nn.init``."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def without_memory(config: ModelConfig) -> Transformer:
    """A model whose parameters have shapes and no memory yet."""
    with torch.device("meta"), _SkipRandomInit():
        return Transformer(config)


def _ready(model: Transformer, device: torch.device) -> Transformer:
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.rope.to(device)
    return model.eval().requires_grad_(False)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to use; a GPU if there is one and nothing was asked for.

    Raises:
        UsageError: unknown, or not on this machine.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"unknown device {device!r}", "Try cpu, cuda or cuda:1.") from None
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {found.type!r} is not supported", "Supported: cpu, cuda.")
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"there is no {found} on this machine", f"CUDA devices here: {torch.cuda.device_count()}.")
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)  # kernels that are not PyTorch's, and captures, run on the current one
    return found


def resolve_dtype(dtype: str | torch.dtype | None, stored: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: what was asked for, else what the checkpoint is stored in.

    Raises:
        UsageError: unknown, or not a floating-point type that is supported.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise UsageError(f"dtype {dtype} is not supported", f"Supported: {', '.join(DTYPES)}.")
        return dtype
    if dtype is not None and dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}", f"Supported: {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    chosen = DTYPES.get(stored, torch.float32)
    if chosen is torch.float16 and device.type == "cpu":
        sys.stderr.write("axon: float16 is slow on CPUs; computing in float32 (--dtype float16 insists)\n")
        return torch.float32
    return chosen
