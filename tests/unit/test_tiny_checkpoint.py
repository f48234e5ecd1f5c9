"""The checkpoint that ships: its size, layout and checksum, and a small part of its evaluation."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from axon_llm import load
from axon_llm.locate import DEFAULT_MODEL, locate
from tests.needs import need_module
from weights.dialogues import conversation, render
from weights.evaluate import evaluate_recall, evaluate_stories
from weights.templates import unmark

TINY = Path(__file__).resolve().parents[2] / "weights" / "axon-tiny"


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def backend():
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference():
    transformers = need_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(TINY, local_files_only=True)


def said(seed, characters=600):
    """A generated conversation as plain messages that end with the user's turn."""
    messages = conversation(random.Random(seed), characters)
    return [{**message, "content": unmark(message["content"])[0]} for message in messages][:-1]


def test_it_is_what_the_default_name_stands_for():
    assert locate(DEFAULT_MODEL).resolve() == TINY


def test_it_is_small_enough_and_for_a_context_of_2048(tiny):
    model, _ = tiny
    assert model.config.num_parameters <= 8_000_000
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 16_000_000
    assert model.config.max_position_embeddings >= 2048


def test_its_checksum_is_the_one_written_down():
    checksum, name = (TINY / "SHA256SUMS").read_text(encoding="utf-8").split()
    assert hashlib.sha256((TINY / name).read_bytes()).hexdigest() == checksum


def test_it_is_stored_in_bfloat16_under_hugging_faces_names():
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert {str(file.get_slice(name).get_dtype()) for name in names} == {"BF16"}
    assert all(name.startswith("model.") for name in names)
    assert "model.layers.0.self_attn.q_proj.weight" in names


def test_every_weight_is_finite(tiny):
    model, _ = tiny
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_transformers_loads_it_as_it_is_and_computes_the_same_logits(tiny, reference):
    model, tokenizer = tiny
    theirs, _ = reference
    ids = torch.tensor([tokenizer.encode_chat(said(1))])
    ours = model(ids, torch.arange(ids.shape[1])[None], None)
    with torch.inference_mode():
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_chat_template_gives_the_training_format_token_for_token(tiny, backend, reference, seed):
    _, tokenizer = tiny
    _, theirs = reference
    messages = said(seed)
    trained = backend.encode(render(messages, add_generation_prompt=True), add_special_tokens=False).ids
    assert tokenizer.encode_chat(messages) == trained
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == trained


def test_a_prompt_begins_as_training_documents_do(tiny, reference):
    _, tokenizer = tiny
    _, theirs = reference
    ids = tokenizer.encode("Once upon a time")
    assert ids[0] == tiny[0].config.bos_token_id
    assert ids == theirs("Once upon a time")["input_ids"]


def test_any_text_survives_the_tokenizer(tiny):
    _, tokenizer = tiny
    text = "Größe 12,345 – 猫 🐈 <|im_end|>\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_generation_ends_at_the_end_of_a_story_and_of_a_turn(tiny):
    model, tokenizer = tiny
    ends = {tokenizer.encode(text, special=False, parse_special=True)[0] for text in ("<|endoftext|>", "<|im_end|>")}
    assert set(model.config.eos_token_ids) == ends
    assert set(json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]) == ends


@pytest.mark.parametrize(("distance", "least"), [(128, 0.95), (512, 0.875), (1500, 0.9)])
def test_it_recalls_facts_on_names_and_combinations_it_never_saw(tiny, backend, distance, least):
    model, _ = tiny
    result, wrong = evaluate_recall(model, backend, distance, 40, seed="test")
    assert result["recalled"] >= least, [(case.key, case.value, answer) for case, answer in wrong]


def test_its_stories_name_only_who_and_what_was_introduced(tiny, backend):
    model, _ = tiny
    result, failed = evaluate_stories(model, backend, 20, seed=1000)
    assert result["consistent"] >= 0.85, failed
