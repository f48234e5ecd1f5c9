"""Measure what axon-tiny can do: ``python -m weights.evaluate`` (or ``make eval-tiny``).

Three measurements in float32, all with fixed seeds; names and combinations of fact and value are ones that training
text never contains:

- recall: a fact told so many tokens ago is asked for; greedy; the answer must contain it;
- stories: 200 tokens after "Once upon a time", sampled; only people and places that were introduced may be named;
- perplexity of held-out stories, and of what the assistant says in held-out dialogues.

Decisions during training were made on seed 0; another ``--seed`` gives cases that nothing was selected on.

Read next: ``recall.py`` (how a case is written), ``consistency.py`` (how a story is checked).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from axon_llm.cache import KVCache
from axon_llm.checkpoint import load
from axon_llm.model import Transformer

from .consistency import check_story
from .corpus import row, said_by_assistant
from .recall import RecallCase, recall_case, recalled

SHIPPED = Path(__file__).parent / "axon-tiny"
DISTANCES = (64, 128, 256, 512, 1024, 1500)
Report = Callable[[str], None]


@torch.inference_mode()
def complete(
    model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, *, stop: frozenset[int], temperature: float = 0.0,
    top_p: float = 1.0, seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Continue prompts of equal length, all in one batch; greedy when ``temperature`` is 0.

    Returns:
        For each prompt its new tokens, without the stop token.
    """
    tokens = torch.tensor(prompts)  # [B, T]
    B, T = tokens.shape
    cache = KVCache(model.config, slots=B, max_seq_len=T + max_tokens, dtype=model.embed_tokens.weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(T).expand(B, T)
    out: list[list[int]] = [[] for _ in range(B)]
    running = [True] * B
    for step in range(max_tokens):
        view = cache.view(length=min(-(-(T + step) // 64) * 64, cache.max_seq_len))
        last = torch.full((B,), tokens.shape[1] - 1)
        logits = model(tokens, positions, view, logits_at=last)[:, 0]  # [B, V]
        tokens = _pick(logits, temperature, top_p, generator)  # [B, 1]
        positions = positions[:, -1:] + 1
        for i, token in enumerate(tokens[:, 0].tolist()):
            running[i] = running[i] and token not in stop
            if running[i]:
                out[i].append(token)
        if not any(running):
            break
    return out


def _pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return order.gather(-1, probabilities.multinomial(1, generator=generator))


def evaluate_recall(
    model: Transformer, tokenizer: Tokenizer, distance: int, cases: int, seed: str = "recall"
) -> tuple[dict[str, Any], list[tuple[RecallCase, str]]]:
    """Ask for facts told ``distance`` tokens ago; every third is the user's name.

    Returns:
        Counts and shares, and the cases that went wrong with the answers given.
    """
    wrong: list[tuple[RecallCase, str]] = []
    names = names_right = 0
    for i in range(cases):
        case = recall_case(tokenizer, random.Random(f"{seed}/{distance}/{i}"), distance, name=i % 3 == 0)
        stop = frozenset(model.config.eos_token_ids)
        answer = tokenizer.decode(complete(model, [case.prompt], 40, stop=stop)[0])
        right = recalled(answer, case.value)
        if not right:
            wrong.append((case, answer))
        names += case.key == "name"
        names_right += right and case.key == "name"
    share = 1 - len(wrong) / cases
    result = {
        "distance_tokens": distance,
        "cases": cases,
        "recalled": round(share, 4),
        "user_name_cases": names,
        "user_name": round(names_right / max(names, 1), 4),
    }
    return result, wrong


def evaluate_stories(
    model: Transformer,
    tokenizer: Tokenizer,
    samples: int,
    tokens: int = 200,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, Any], list[str]]:
    """Sample stories; check that no name stands there without an introduction, and that the hero stays "he" or "she".

    Returns:
        Counts and shares, and the stories that failed.
    """
    prompt = tokenizer.encode("Once upon a time").ids
    failed, done, agree, with_pronouns = [], 0, 0, 0
    while done < samples:
        rows = min(50, samples - done)
        stop = frozenset(model.config.eos_token_ids)
        outputs = complete(
            model, [prompt] * rows, tokens, stop=stop, temperature=temperature, top_p=top_p, seed=seed + done
        )
        texts = ["Once upon a time" + tokenizer.decode(ids) for ids in outputs]
        verdicts = [check_story(text) for text in texts]
        failed += [text for text, verdict in zip(texts, verdicts, strict=True) if not verdict.consistent]
        agree += sum(verdict.pronouns_agree is True for verdict in verdicts)
        with_pronouns += sum(verdict.pronouns_agree is not None for verdict in verdicts)
        done += rows
    share = 1 - len(failed) / samples
    result = {
        "samples": samples,
        "tokens": tokens,
        "temperature": temperature,
        "top_p": top_p,
        "consistent": round(share, 4),
        "with_pronouns": with_pronouns,
        "pronouns_agree": round(agree / max(with_pronouns, 1), 4),
    }
    return result, failed


@torch.inference_mode()
def evaluate_perplexity(
    model: Transformer, tokenizer: Tokenizer, stories: bool, rows: int = 32, length: int = 512, seed: str = "held-out"
) -> dict[str, Any]:
    """Perplexity per token of text with unseen names: whole stories, or what the assistant says in dialogues.

    Of a dialogue the assistant's words count and the mark that ends its turn, as those are what it has to produce; the
    rest of the chat format is always the same.
    """
    loss = count = 0.0
    for i in range(rows):
        ids, _ = row(tokenizer, random.Random(f"{seed}/{stories}/{i}"), length + 1, float(stories), unseen=True)
        tokens = torch.tensor([ids])
        logits = model(tokens[:, :-1], torch.arange(length)[None], None)[0]  # [T, V]
        counted = torch.tensor([True] * length if stories else said_by_assistant(tokenizer, ids)[1:])
        each = F.cross_entropy(logits.float(), tokens[0, 1:], reduction="none")
        loss, count = loss + float(each[counted].sum()), count + int(counted.sum())
    return {
        "text": "stories" if stories else "dialogues, what the assistant says",
        "tokens": int(count),
        "perplexity": round(math.exp(loss / count), 3),
    }


def evaluate(folder: Path, cases: int, samples: int, report: Report, show: int = 0, seed: int = 0) -> dict[str, Any]:
    """Run all three measurements on a checkpoint folder and return one JSON-ready object."""
    model, _ = load(folder, device="cpu", dtype="float32")  # where the tokens below are made, whatever cards there are
    model.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    recall, of_seed = [], f"-{seed}" if seed else ""
    for distance in DISTANCES:
        result, wrong = evaluate_recall(model, tokenizer, distance, cases, "recall" + of_seed)
        recall.append(result)
        report(
            f"recall at {distance:5} tokens: {result['recalled']:6.1%} of {cases}"
            f" (the user's name: {result['user_name']:.1%} of {result['user_name_cases']})"
        )
        for case, answer in wrong[:show]:
            report(f"    {case.key} = {case.value!r}: {answer!r}")
    stories, failed = evaluate_stories(model, tokenizer, samples, seed=seed * 10_000)
    report(f"only introduced names:  {stories['consistent']:6.1%} of {samples} stories")
    report(f"hero's pronouns agree:  {stories['pronouns_agree']:6.1%} of {stories['with_pronouns']} with pronouns")
    for text in failed[:show]:
        report(f"    {check_story(text)}: {text!r}")
    perplexity = [evaluate_perplexity(model, tokenizer, kind, seed="held-out" + of_seed) for kind in (True, False)]
    for result in perplexity:
        report(f"perplexity, {result['text']}: {result['perplexity']} over {result['tokens']} tokens")
    return {"schema": "axon.eval-tiny/2", "seed": seed, "recall": recall, "stories": stories, "perplexity": perplexity}


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m weights.evaluate", description="Evaluate axon-tiny.")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="checkpoint folder (default: the one that ships)")
    parser.add_argument("--cases", type=int, default=200, help="recall cases per distance")
    parser.add_argument("--samples", type=int, default=200, help="stories")
    parser.add_argument("--seed", type=int, default=0, help="of cases, samples and held-out text")
    parser.add_argument("--show", type=int, default=0, help="show so many failures of each kind")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)

    def report(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    figures = evaluate(options.model, options.cases, options.samples, report, options.show, options.seed)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
