"""Rotary position embedding as a ``config.json`` describes it. ``layers/rope.py`` computes it.

Read next: ``config.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from axon_llm.config_keys import Keys
from axon_llm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: the base angle and how it is stretched.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: ``"default"``, ``"linear"``, ``"llama3"`` or ``"yarn"``.
        factor: how many times the original context is stretched (all kinds but default).
        original_max_position_embeddings: the context before stretching (llama3, yarn).
        low_freq_factor: llama3, wavelengths above original / this are divided by ``factor``.
        high_freq_factor: llama3, wavelengths below original / this are kept.
        beta_fast: yarn, channels with more turns than this are kept.
        beta_slow: yarn, channels with fewer turns than this are divided by ``factor``.
        truncate: yarn, round the channel range outwards to whole channels.
        attention_factor: yarn, factor on cosine and sine.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def read_rope(keys: Keys, max_position_embeddings: int) -> tuple[RopeConfig, int]:
    """Both spellings: ``rope_theta`` + ``rope_scaling`` of published checkpoints, ``rope_parameters`` of newer ones.

    Args:
        keys: of the whole file.
        max_position_embeddings: as the file states it.

    Returns:
        The rotary embedding, and the longest context with it.

    Raises:
        ConfigError: a parameter is missing, malformed, unknown, or contradicts another.
    """
    theta = keys.take("rope_theta", float, None)
    scaling = keys.take("rope_scaling", dict, None)
    parameters = keys.take("rope_parameters", dict, None)
    if scaling and parameters and any(parameters.get(name) != value for name, value in scaling.items()):
        raise ConfigError("rope_scaling and rope_parameters contradict each other", "Remove the one that is wrong.")
    rope = Keys({**(scaling or {}), **(parameters or {})})
    theta_inside = rope.take("rope_theta", float, None)
    theta = theta_inside if theta_inside is not None else theta if theta is not None else 10_000.0
    old_name = rope.take("type", str, None)
    kind = rope.take("rope_type", str, old_name) or "default"
    partial = rope.take("partial_rotary_factor", float, 1.0)
    if partial != 1.0:
        raise ConfigError(f"rope partial_rotary_factor = {partial} is not supported")
    if not theta > 1 or not math.isfinite(theta):
        raise ConfigError(f"rope_theta must be above 1, not {theta}")
    fields: dict[str, Any] = {}
    if kind in ("linear", "llama3", "yarn"):
        fields["factor"] = rope.take("factor", float, None)
        if fields["factor"] is None and kind != "yarn":
            raise ConfigError(f"rope {kind} needs a factor")
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            fields[name] = rope.take(name, float)
        original = rope.take("original_max_position_embeddings", int, max_position_embeddings)
        fields["original_max_position_embeddings"] = original
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise ConfigError("rope llama3 needs high_freq_factor above low_freq_factor")
    elif kind == "yarn":
        fields |= _read_yarn(rope, max_position_embeddings, fields["factor"])
    elif kind not in ("default", "linear"):
        raise ConfigError(f"rope type {kind!r} is not supported", "Supported: default, linear, llama3, yarn.")
    # Files written by converters may carry the original context along where it has no effect.
    if rope.take("original_max_position_embeddings", int, 1) < 1:
        raise ConfigError("rope original_max_position_embeddings must be positive")
    rope.take("finetuned", bool, None)  # says who stretched the context, not how
    for name, value in rope.raw.items():
        if name not in rope.read and value is not None:
            raise ConfigError(f"rope parameter {name!r} = {value!r} is not supported with type {kind!r}")
    factor = fields.get("factor", 1.0)
    if factor <= 0 or not math.isfinite(factor):
        raise ConfigError(f"rope factor must be positive, not {factor}")
    context, original = max_position_embeddings, rope.raw.get("original_max_position_embeddings")
    if kind == "yarn" and original is not None:
        # Qwen's instructions add yarn to a file and leave its context as it was. Not so for linear, which does not tell
        # what it stretches: some files state the context before, some after.
        stretched = original * factor
        if not math.isfinite(stretched):
            raise ConfigError(f"rope factor {factor} stretches the context beyond all bounds")
        context = max(context, int(stretched))
    return RopeConfig(theta=theta, kind=kind, **fields), context


def _read_yarn(rope: Keys, max_position_embeddings: int, factor: float | None) -> dict[str, Any]:
    """Yarn's parameters, with its attention factor worked out (Peng et al., 2023, section 3.4)."""
    original = max(1, rope.take("original_max_position_embeddings", int, max_position_embeddings))
    factor = max_position_embeddings / original if factor is None else factor
    mscale, mscale_all_dim = rope.take("mscale", float, None), rope.take("mscale_all_dim", float, None)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    ratio = temperature(mscale) / temperature(mscale_all_dim) if mscale and mscale_all_dim else temperature(1.0)
    given = rope.take("attention_factor", float, None)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": rope.take("beta_fast", float, None) or 32.0,
        "beta_slow": rope.take("beta_slow", float, None) or 1.0,
        "truncate": "truncate" not in rope.raw or rope.take("truncate", bool, False),  # null means no
        "attention_factor": ratio if given is None else given,
    }
