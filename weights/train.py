"""Train axon-tiny from nothing: ``python -m weights.train`` (or ``make train-tiny``).

One command end to end, on CPU or GPU; ``--minutes 90`` sets the budget in time instead of tokens. It trains the
tokenizer, then the model, and writes the checkpoint, the loss log and the loss curve. Interrupted, it goes on where it
stopped when started again with the same ``--run`` folder, also with another budget; ``--init FOLDER`` trains a finished
checkpoint further, on text it has not been trained on. What it trains is the same ``Transformer`` that serves; only the
attention mask is replaced by its causal special case, which is faster and needs no mask in memory.

Read next: ``corpus.py`` (what it is trained on), ``evaluate.py`` (what it learnt).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from axon_llm.checkpoint import load
from axon_llm.config import ModelConfig
from axon_llm.layers import attention
from axon_llm.model import Transformer

from .corpus import batch
from .curve import draw_curve
from .export import export
from .tokenizer_training import train_tokenizer

CONFIG = ModelConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=704, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64,
    max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_ids=(1, 3), norm_eps=1e-5,
)  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """How fast and on what lengths to train, as the budget is spent; ``spent`` is its share from 0 to 1.

    Attributes:
        peak_lr: learning rate after warm-up.
        warm_up: steps until then.
        decay_from: share of the budget after which the rate falls linearly to zero.
        phases: (share of the budget at which the phase begins, sequence length it brings in).
        step_tokens: tokens per step by sequence length.
        long_share: share of the steps that have the phase's own length, until 80 % of the budget; then at least 0.7.
    """

    peak_lr: float = 2e-3
    warm_up: int = 150
    decay_from: float = 0.6
    phases: tuple[tuple[float, int], ...] = ((0.0, 256), (0.2, 512), (0.4, 1024), (0.62, 2048))
    step_tokens: tuple[tuple[int, int], ...] = ((256, 4096), (512, 4096), (1024, 8192), (2048, 8192))
    long_share: float = 0.4

    @classmethod
    def further(cls, peak_lr: float, long_share: float = 0.4) -> Schedule:
        """For weights that are trained already: every length but the shortest from the start, and an earlier decay."""
        same = ((512, 8192), (1024, 8192), (2048, 8192))
        phases = tuple((0.0, length) for length, _ in same)
        return cls(peak_lr, decay_from=0.3, phases=phases, step_tokens=same, long_share=long_share)

    def rate(self, step: int, spent: float) -> float:
        """Learning rate at a step."""
        left = (1 - spent) / (1 - self.decay_from)
        return self.peak_lr * min(1.0, (step + 1) / self.warm_up, max(left, 0.02))

    def shape(self, rng: random.Random, spent: float) -> tuple[int, int, float, float]:
        """Rows, length, shares of stories and of drills of the next batch: often the phase's length, else a shorter."""
        lengths = [length for begins, length in self.phases if begins <= spent]
        length = (
            lengths[-1]
            if len(lengths) == 1 or rng.random() < (self.long_share if spent < 0.8 else max(self.long_share, 0.7))
            else rng.choice(lengths[:-1])
        )
        rows = max(1, dict(self.step_tokens)[length] // length)
        drills = 0.1 if spent > self.decay_from or length > 512 else 0.25
        return rows, length, 0.5 if length <= 512 else 0.15, drills


@dataclass(frozen=True)
class Budget:
    """What a run may cost: tokens, or seconds of training where those are given."""

    tokens: int
    seconds: float | None = None

    def spent(self, tokens: int, seconds: float) -> float:
        """The share that is used up."""
        return min(1.0, tokens / self.tokens if self.seconds is None else seconds / self.seconds)


def causal_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``axon_llm.layers.attention.attend`` for whole sequences: each token sees those before it, whatever ``mask``."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@contextmanager
def causal_attention() -> Iterator[None]:
    """Let every attention layer use ``causal_attend`` for a while."""
    usual = attention.attend
    attention.attend = causal_attend
    try:
        yield
    finally:
        attention.attend = usual


def fresh_model(config: ModelConfig, seed: int) -> Transformer:
    """A model with small random weights; what is added to the residual stream starts smaller the deeper the model."""
    torch.manual_seed(seed)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.num_layers) if into_stream else 1))
    return model


class Trainer:
    """Everything that a run consists of and that a resumed run has to find again."""

    def __init__(
        self,
        config: ModelConfig,
        schedule: Schedule,
        budget: Budget,
        run: Path,
        *,
        seed: int,
        device: str,
        compiled: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config, self.schedule, self.budget, self.run, self.seed = config, schedule, budget, run, seed
        self.device, self.dtype = torch.device(device), dtype
        self.model = fresh_model(config, seed).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.peak_lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
        # The average of the recent weights is better than any of them while the rate is high: it is what is exported.
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.data_seed = f"train/{seed}"
        self.step = self.done = 0
        self.seconds = 0.0
        self.losses: list[tuple[float, float]] = []
        self.loss: Callable[..., Tensor] = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = self.model(tokens, positions, None)  # [B, T, vocab]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()

    @property
    def spent(self) -> float:
        """The share of the budget that is used up."""
        return self.budget.spent(self.done, self.seconds)

    def train_step(self, tokenizer: Tokenizer) -> float:
        """One batch, one update; returns the loss."""
        began, seed = time.monotonic(), f"{self.data_seed}/{self.step}"
        rows, length, stories, drills = self.schedule.shape(random.Random(seed), self.spent)
        data = [tensor.to(self.device) for tensor in batch(tokenizer, seed, rows, length, stories, drills)]
        rate = self.schedule.rate(self.step, self.spent)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(*data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keep = min(0.99, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - keep)
        self.step += 1
        self.done += rows * length
        value = float(loss.detach())
        self.losses.append((self.done / 1e6, value))
        self.seconds += time.monotonic() - began
        return value

    def begin_from(self, folder: Path) -> None:
        """Take the weights of a checkpoint instead of random ones, and rows of text that depend on them.

        Every run counts its steps from 0: with the seed alone, it would see again what the checkpoint was trained on.
        """
        model, _ = load(folder, device=self.device, dtype="float32")
        self.model.load_state_dict(model.state_dict())
        self.average = [p.detach().clone() for p in self.model.parameters()]
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        self.data_seed = f"train/{self.seed}/{digest.hexdigest()[:16]}"

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights under the model's names."""
        return dict(zip((name for name, _ in self.model.named_parameters()), self.average, strict=True))

    def save(self) -> None:
        """Write everything a resumed run needs, replacing the last one whole."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
            "step": self.step, "done": self.done, "seconds": self.seconds, "losses": self.losses,
            "data_seed": self.data_seed,
        }  # fmt: skip
        torch.save(state, self.run / "state.tmp")
        (self.run / "state.tmp").replace(self.run / "state.pt")

    def resume(self) -> bool:
        """Go on from a saved state, if there is one."""
        path = self.run / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step, self.done, self.seconds = state["step"], state["done"], state["seconds"]
        self.losses = [tuple(point) for point in state["losses"]]
        self.data_seed = state.get("data_seed", self.data_seed)  # older states lack it: theirs is the seed alone
        return True


def train(trainer: Trainer, tokenizer: Tokenizer, out: Path, save_every_s: float = 120.0) -> None:
    """Train until the budget is spent; save the state and export the averaged weights on the way and at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.1f} %"),
        TimeRemainingColumn(),
    )
    console, saved = Console(stderr=True), time.monotonic()
    with causal_attention(), Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("training", total=1.0)
        while trainer.spent < 1:
            loss = trainer.train_step(tokenizer)
            progress.update(task, completed=trainer.spent, description=f"step {trainer.step} loss {loss:.3f}")
            line = {
                "step": trainer.step, "tokens": trainer.done, "loss": round(loss, 4), "spent": round(trainer.spent, 5),
                "seconds": round(trainer.seconds, 2),
            }  # fmt: skip
            with (trainer.run / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            if time.monotonic() - saved > save_every_s:
                _write(trainer, out)
                saved = time.monotonic()
    # Also where nothing was left to train: a run may have ended between its last state and the checkpoint of it.
    _write(trainer, out)


def _write(trainer: Trainer, out: Path) -> None:
    trainer.save()
    export(out, trainer.config, trainer.averaged())
    draw_curve(out / "loss.svg", trainer.losses)


def _amount(least: float) -> Callable[[str], float]:
    """A type for ``argparse``: a finite number, ``least`` or more, and more than 0."""

    def parse(text: str) -> float:
        number = float(text)
        if not math.isfinite(number) or number <= 0 or number < least:
            raise argparse.ArgumentTypeError(f"{text} is not {f'at least {least:g}' if least else 'above 0'}")
        return number

    parse.__name__ = "number"  # what argparse calls it where the text is none
    return parse


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m weights.train", description="Train axon-tiny from nothing.")
    parser.add_argument("--out", type=Path, default=Path("var/axon-tiny"), help="checkpoint folder to write")
    parser.add_argument("--run", type=Path, help="folder of the run's state and log (default: OUT with .run)")
    parser.add_argument("--init", type=Path, help="checkpoint folder to train further, instead of random weights")
    parser.add_argument("--tokens", type=_amount(1), default=16e6, help="token budget")
    parser.add_argument("--minutes", type=_amount(0), help="budget in minutes of training, instead of tokens")
    parser.add_argument("--long-share", type=float, default=0.4, help="with --init: share of steps of the full context")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="of the products; float32 is faster on Intel CPUs without AMX",
    )  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every-s", type=float, default=120.0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = options.run or options.out.with_name(options.out.name + ".run")
    run.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    saved = (options.init or options.out) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(saved)) if saved.exists() else train_tokenizer(options.out, CONFIG.vocab_size)
    budget = Budget(int(options.tokens), None if options.minutes is None else options.minutes * 60)
    trainer = Trainer(
        CONFIG,
        Schedule.further(options.lr, options.long_share) if options.init else Schedule(peak_lr=options.lr),
        budget,
        run,
        seed=options.seed,
        device=options.device,
        compiled=options.compile,
        dtype=getattr(torch, options.dtype),
    )
    if trainer.resume():
        print(f"resuming at step {trainer.step}, {trainer.done / 1e6:.2f} M tokens", file=sys.stderr)
    elif options.init:
        trainer.begin_from(options.init)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(options.init / name, options.out)
    train(trainer, tokenizer, options.out, options.save_every_s)


if __name__ == "__main__":
    main()
