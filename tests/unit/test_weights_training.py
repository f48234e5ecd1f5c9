"""The whole recipe at toy size: tokenizer, training, checkpoint, resume, export, loss curve."""

import dataclasses
import json
import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from tokenizers import Tokenizer

from axon_llm import load
from axon_llm.layers import attention
from weights import evaluate as evaluation
from weights import train as recipe
from weights.corpus import RECALL_WEIGHT, USER_WEIGHT, batch, dialogue_text, encode, said_by_assistant
from weights.dialogues import conversation, render
from weights.export import export
from weights.mean import mean
from weights.templates import unmark
from weights.tokenizer_training import train_tokenizer

VOCAB = 600
TOY = dataclasses.replace(
    recipe.CONFIG, vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16, layer_windows=(),
)  # fmt: skip
SCHEDULE = recipe.Schedule(peak_lr=1e-2, warm_up=3, phases=((0.0, 64), (0.5, 128)), step_tokens=((64, 512), (128, 512)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    train_tokenizer(folder, VOCAB, documents=40)
    return folder


@pytest.fixture
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def trainer(run, tokens):
    return recipe.Trainer(TOY, SCHEDULE, recipe.Budget(tokens), run, seed=1, device="cpu", compiled=False)


def test_the_recipe_trains_and_writes_a_checkpoint_that_loads(folder, tokenizer, tmp_path):
    toy = trainer(tmp_path, 30 * 512)
    recipe.train(toy, tokenizer, folder)
    first, last = (sum(loss for _, loss in part) / 5 for part in (toy.losses[:5], toy.losses[-5:]))
    assert toy.step == 30
    assert last < first - 0.5
    model, text_side = load(folder, dtype="float32", device="cpu")
    for name, weight in toy.averaged().items():
        torch.testing.assert_close(model.get_parameter(name), weight.bfloat16().float(), rtol=0, atol=0)
    assert text_side.vocab_size == VOCAB
    assert ElementTree.parse(folder / "loss.svg").getroot().tag.endswith("svg")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 31))


def test_a_resumed_run_is_the_unbroken_run(tokenizer, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, broken = trainer(tmp_path / "whole", 10 * 512), trainer(tmp_path / "broken", 10 * 512)
    for _ in range(8):
        whole.train_step(tokenizer)
    for _ in range(4):
        broken.train_step(tokenizer)
    broken.save()
    resumed = trainer(tmp_path / "broken", 10 * 512)
    assert resumed.resume()
    for _ in range(4):
        resumed.train_step(tokenizer)
    assert resumed.losses == whole.losses
    for left, right in zip(whole.average, resumed.average, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_a_run_that_ended_between_its_last_state_and_the_checkpoint_writes_it_when_started_again(tokenizer, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    ended = trainer(run, 2 * 512)
    while ended.spent < 1:
        ended.train_step(tokenizer)
    ended.save()
    again = trainer(run, 2 * 512)
    assert again.resume()
    recipe.train(again, tokenizer, out)
    assert again.step == ended.step
    assert {"config.json", "model.safetensors", "loss.svg"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    "words",
    [("--minutes", "0"), ("--minutes", "nan"), ("--tokens", "0"), ("--tokens", "0.5"), ("--tokens", "inf")],
)
def test_a_budget_of_nothing_or_without_end_is_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        recipe.main(["--out", str(tmp_path / "model"), *words])
    assert refused.value.code == 2
    assert f"argument {words[0]}: {words[1]} is not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_evaluation_loads_the_model_where_it_makes_its_tokens(folder, monkeypatch):
    class LoadedError(Exception):
        pass

    def loading(path, device=None, dtype=None):
        raise LoadedError(f"{device} {dtype}")

    monkeypatch.setattr(evaluation, "load", loading)
    with pytest.raises(LoadedError, match="cpu float32"):
        evaluation.evaluate(folder, 1, 1, print)


def test_stories_without_pronouns_are_not_counted_among_those_whose_pronouns_agree(tokenizer, monkeypatch):
    endings = [
        ", a fox named Edda lived in the town of Varn. " + told for told in ("She sang.", "He saw her.", "Rain fell.")
    ]
    told = [tokenizer.encode(text, add_special_tokens=False).ids for text in endings]
    monkeypatch.setattr(evaluation, "complete", lambda *_, **__: told)
    figures, _ = evaluation.evaluate_stories(recipe.fresh_model(TOY, seed=0), tokenizer, 3)
    assert (figures["samples"], figures["with_pronouns"], figures["pronouns_agree"]) == (3, 2, 0.5)


def test_another_seed_evaluates_other_cases_samples_and_text(folder, monkeypatch):
    seeds: dict[str, set[object]] = {"recall": set(), "stories": set(), "perplexity": set()}
    model = recipe.fresh_model(TOY, seed=0)

    def recall(model, tokenizer, distance, cases, seed):
        seeds["recall"].add(seed)
        return {"recalled": 1.0, "user_name": 1.0, "user_name_cases": 1}, []

    def stories(model, tokenizer, samples, seed):
        seeds["stories"].add(seed)
        return {"consistent": 1.0, "with_pronouns": 1, "pronouns_agree": 1.0}, []

    def perplexity(model, tokenizer, kind, seed):
        seeds["perplexity"].add(seed)
        return {"text": "", "perplexity": 1.0, "tokens": 1}

    monkeypatch.setattr(evaluation, "load", lambda *_, **__: (model, None))
    for name, fake in (("recall", recall), ("stories", stories), ("perplexity", perplexity)):
        monkeypatch.setattr(evaluation, f"evaluate_{name}", fake)
    for seed in (0, 1):
        assert evaluation.evaluate(folder, 1, 1, lambda _: None, seed=seed)["seed"] == seed
    assert {name: len(used) for name, used in seeds.items()} == {"recall": 2, "stories": 2, "perplexity": 2}


def test_only_the_assistants_words_and_the_end_of_its_turn_count_in_a_dialogues_perplexity(tokenizer):
    messages = [("system", "Be polite."), ("user", "What is my assistant?"), ("assistant", "A user."), ("user", "So")]
    text = render([{"role": role, "content": content} for role, content in messages])
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    said = [token for token, counts in zip(ids, said_by_assistant(tokenizer, ids), strict=True) if counts]
    assert tokenizer.decode(said, skip_special_tokens=False) == "A user.<|im_end|>"


def test_a_checkpoint_trained_further_sees_other_text_and_goes_on_with_it_when_resumed(folder, tokenizer, tmp_path):
    out, run = tmp_path / "one", tmp_path / "run"
    run.mkdir()
    export(out, TOY, recipe.fresh_model(TOY, 7).state_dict())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    fresh, further, same = (trainer(run, 512) for _ in range(3))
    further.begin_from(out)
    same.begin_from(out)
    assert fresh.data_seed != further.data_seed == same.data_seed
    further.save()
    assert fresh.resume()
    assert fresh.data_seed == further.data_seed


def test_training_leaves_the_serving_attention_as_it_was():
    usual = attention.attend
    with recipe.causal_attention():
        assert attention.attend is recipe.causal_attend
    assert attention.attend is usual


def test_the_training_attention_gives_the_serving_models_logits():
    model = recipe.fresh_model(TOY, seed=0)
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20).expand(2, 20)
    usual = model(tokens, positions, None)
    with recipe.causal_attention():
        torch.testing.assert_close(model(tokens, positions, None), usual, rtol=1e-4, atol=1e-4)


def test_rows_are_full_and_a_function_of_the_seed(tokenizer):
    first, again, other = (batch(tokenizer, seed, 3, 96, 0.5) for seed in ("a", "a", "b"))
    assert first[0].shape == first[1].shape == first[2].shape == (3, 96)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])


def test_recalled_values_weigh_more_and_the_users_words_less(tokenizer):
    marked = render(conversation(random.Random(4), 1500))
    text, spans = unmark(marked)
    ids, weights = encode(tokenizer, marked)
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    assert len(ids) == len(weights) == len(offsets)
    for (begin, end), weight in zip(offsets, weights, strict=True):
        inside = any(begin < b and a < end for a, b in spans)
        assert inside == (weight == RECALL_WEIGHT), (text[begin:end], weight)
    user_text = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    at = text.index(user_text)
    assert {w for (b, _), w in zip(offsets, weights, strict=True) if at <= b < at + len(user_text)} == {USER_WEIGHT}


def test_the_learning_rate_warms_up_stays_and_falls_to_almost_nothing():
    schedule = recipe.Schedule(peak_lr=1.0, warm_up=10, decay_from=0.5)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(50, 0.3) == 1.0
    assert schedule.rate(90, 0.75) == pytest.approx(0.5)
    assert schedule.rate(99, 1.0) == pytest.approx(0.02)


def test_long_sequences_join_late_and_short_ones_stay():
    schedule = recipe.Schedule()
    drawn = {spent: {schedule.shape(random.Random(i), spent)[1] for i in range(200)} for spent in (0.0, 0.3, 0.5, 0.9)}
    assert drawn == {0.0: {256}, 0.3: {256, 512}, 0.5: {256, 512, 1024}, 0.9: {256, 512, 1024, 2048}}


def test_a_budget_in_time_is_spent_by_time():
    assert recipe.Budget(1000).spent(500, 99.0) == 0.5
    assert recipe.Budget(1000, seconds=10.0).spent(0, 2.5) == 0.25
    assert recipe.Budget(1000, seconds=10.0).spent(0, 99.0) == 1.0


def test_dialogue_documents_are_about_as_long_as_asked_for(tokenizer):
    lengths = [len(encode(tokenizer, dialogue_text(random.Random(i), 500))[0]) for i in range(10)]
    assert min(lengths) >= 450


def test_one_command_goes_from_nothing_to_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "CONFIG", TOY)
    monkeypatch.setattr(recipe, "Schedule", lambda peak_lr: dataclasses.replace(SCHEDULE, peak_lr=peak_lr))
    monkeypatch.setattr(recipe, "train_tokenizer", lambda out, size: train_tokenizer(out, size, documents=20))
    out = tmp_path / "model"
    recipe.main(["--out", str(out), "--tokens", "2048", "--no-compile", "--device", "cpu"])
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer_config.json",
        "loss.svg",
    }
    assert {path.name for path in out.iterdir()} == wanted
    recipe.main(["--out", str(out), "--tokens", "4096", "--no-compile", "--device", "cpu"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "model.run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == 8


def test_the_mean_of_two_checkpoints_is_theirs_and_has_a_tokenizer(folder, tmp_path):
    names = ("one", "other", "out")
    one, other, out = (tmp_path / name for name in names)
    models = [recipe.fresh_model(TOY, seed) for seed in (1, 2)]
    for path, model in zip((one, other), models, strict=True):
        export(path, TOY, model.state_dict())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((folder / name).read_bytes())
    mean(one, other, out)
    made, text_side = load(out, dtype="float32", device="cpu")
    assert text_side.vocab_size == VOCAB
    for name, weight in made.named_parameters():
        a, b = (model.get_parameter(name).bfloat16().float() for model in models)
        assert torch.equal(weight, ((a + b) / 2).bfloat16().float())
    small = dataclasses.replace(TOY, num_layers=1, layer_windows=())
    export(other, small, recipe.fresh_model(small, 1).state_dict())
    with pytest.raises(ValueError, match="different shapes"):
        mean(one, other, out)
