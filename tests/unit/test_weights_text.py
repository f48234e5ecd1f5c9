"""The generated training text: correct, consistent, and free of the names that evaluation uses."""

import random
import re

import pytest

from weights.consistency import check_story
from weights.dialogues import conversation, render
from weights.facts import draw_fact
from weights.names import held_out, person, town
from weights.recall import recalled
from weights.stories import story
from weights.templates import CLOSE, OPEN, expand, mark, unmark


def test_templates_pick_fill_in_and_use_the_right_article():
    rng = random.Random(0)
    slots = {"kind": "owl", "he": "she"}
    assert (
        expand("A {kind}. {He} was [a|a] hour late for a unicorn.", slots, rng)
        == "An owl. She was an hour late for a unicorn."
    )
    with pytest.raises(KeyError):
        expand("{nobody}", slots, rng)


def test_marks_come_out_and_say_where_they_stood():
    text, spans = unmark(f"Hello {mark('Wanda')}, {mark('red')}.")
    assert text == "Hello Wanda, red."
    assert [text[a:b] for a, b in spans] == ["Wanda", "red"]


def test_names_for_evaluation_are_disjoint_from_those_for_training():
    rng = random.Random(1)
    assert not any(held_out(person(rng)) or held_out(town(rng)) for _ in range(2000))
    assert all(held_out(person(rng, unseen=True)) and held_out(town(rng, unseen=True)) for _ in range(500))
    assert held_out("Wanda")


def test_combinations_for_evaluation_are_disjoint_from_those_for_training():
    rng = random.Random(2)
    trained = {(fact.key, fact.value) for fact in (draw_fact(rng) for _ in range(5000))}
    evaluated = {(fact.key, fact.value) for fact in (draw_fact(rng, unseen=True) for _ in range(500))}
    assert len(trained) > 2000
    assert not trained & evaluated


def test_the_generators_stories_pass_the_consistency_check():
    for seed in range(200):
        text = unmark(story(random.Random(seed), unseen=seed % 2 == 1).text)[0]
        assert check_story(text).consistent, (check_story(text), text)


@pytest.mark.parametrize(
    ("wanted", "swapped"), [("hero", "Ondrik"), ("town", "Ondrikton")], ids=["another hero", "another town"]
)
def test_a_story_in_which_a_name_changes_fails_the_consistency_check(wanted, swapped):
    told = story(random.Random(3))
    text, name = unmark(told.text)[0], getattr(told, wanted)
    last = text.rindex(name)
    changed = text[:last] + swapped + text[last + len(name) :]
    assert swapped in check_story(changed).strangers


def test_stories_have_no_broken_sentences():
    for seed in range(300):
        text = unmark(story(random.Random(seed)).text)[0]
        assert not re.search(r"[{}\[\]|]|  |\?\.|\.\.|,\.|\ba [aeio]", text), text
        assert text[-1] in '.!"?'


def test_every_recalled_value_was_said_before_it_is_recalled():
    for seed in range(60):
        said = ""
        for message in conversation(random.Random(seed), 3000):
            text, spans = unmark(message["content"])
            for begin, end in spans:
                assert text[begin:end].lower() in (said + text[:begin]).lower(), (text, said[-500:])
            said += " " + text


def test_a_conversation_can_end_with_questions_for_what_was_told_at_its_beginning():
    def far_recalls(far: float) -> int:
        count = 0
        for seed in range(20):
            text, spans = unmark(render(conversation(random.Random(seed), 9000, far=far)))
            text = text.lower()
            said = [(text.rfind(text[begin:end], 0, begin), begin) for begin, end in spans]
            assert all(before >= 0 for before, _ in said)
            count += sum(begin - before > 5000 for before, begin in said)
        return count

    assert far_recalls(1.0) > 100 > 2 * far_recalls(0.0)


def test_text_is_the_same_for_the_same_seed_and_differs_for_another():
    texts = [render(conversation(random.Random(seed), 1000)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("answer", "value", "right"),
    [
        ("Your name is Wanda.", "Wanda", True),
        ("Your name is Wand.", "Wanda", False),
        ("Your number is 4821.", "48", False),
        ("Tomorrow you will visit Anna.", "visit Anna", True),
        ("Red is your favourite colour.", "red", True),
        ("You have not told me your name.", "Wanda", False),
    ],
)
def test_an_answer_counts_only_when_it_holds_the_whole_value(answer, value, right):
    assert recalled(answer, value) is right


def test_marks_never_reach_a_rendered_prompt_after_unmarking():
    text, _ = unmark(render(conversation(random.Random(9), 2000)))
    assert OPEN not in text
    assert CLOSE not in text
