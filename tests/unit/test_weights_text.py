"""The generated training text: correct, consistent, and free of the names that evaluation uses."""

import random
import re

import pytest

from weights.consistency import check_story
from weights.dialogues import conversation, render
from weights.facts import draw_fact
from weights.names import held_out, ordinary_words, person, town
from weights.recall import recalled
from weights.small_talk import small_talk
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


def test_names_for_evaluation_are_no_words_of_the_training_text():
    rng = random.Random(1)
    texts = [unmark(story(rng).text)[0] for _ in range(300)]
    written = {word for text in texts for word in re.findall(r"\b[a-z]+\b", text)}
    assert len(written) > 500
    assert written <= ordinary_words()
    names = {draw(rng, unseen=True).lower() for draw in (person, town) for _ in range(3000)}
    assert not names & ordinary_words()
    assert "wanda" not in ordinary_words()


def test_talk_of_other_things_in_evaluation_draws_no_names_of_training():
    asked = [small_talk(random.Random(seed), None, unseen=True)[0] for seed in range(6000)]
    names = [match[1] for said in asked if (match := re.fullmatch(r"(?:Who|Where) is (\w+)\?", said, re.IGNORECASE))]
    assert len(names) > 30
    assert all(map(held_out, names)), names


def test_combinations_for_evaluation_are_disjoint_from_those_for_training():
    rng = random.Random(2)
    trained = {(fact.key, fact.value) for fact in (draw_fact(rng) for _ in range(5000))}
    evaluated = {(fact.key, fact.value) for fact in (draw_fact(rng, unseen=True) for _ in range(500))}
    assert len(trained) > 2000
    assert not trained & evaluated


def test_a_birthday_for_evaluation_is_in_no_spelling_one_for_training():
    def birthdays(unseen: bool) -> set[frozenset[str]]:
        rng = random.Random(3)
        drawn = (draw_fact(rng, unseen) for _ in range(4000 if unseen else 8000))
        return {frozenset(fact.value.split()) for fact in drawn if fact.key == "birthday"}

    trained, evaluated = birthdays(unseen=False), birthdays(unseen=True)
    assert len(trained) > 100
    assert len(evaluated) > 1
    assert not trained & evaluated


def test_the_generators_stories_pass_the_consistency_check():
    for seed in range(200):
        verdict = check_story(text := unmark(story(random.Random(seed), unseen=seed % 2 == 1).text)[0])
        assert verdict.consistent, (verdict, text)
        assert verdict.pronouns_agree is not False, text


@pytest.mark.parametrize(
    ("wanted", "swapped"), [("hero", "Ondrik"), ("town", "Ondrikton")], ids=["another hero", "another town"]
)
def test_a_story_in_which_a_name_changes_fails_the_consistency_check(wanted, swapped):
    told = story(random.Random(3))
    text, name = unmark(told.text)[0], getattr(told, wanted)
    last = text.rindex(name)
    changed = text[:last] + swapped + text[last + len(name) :]
    assert swapped in check_story(changed).strangers


OPENING = "Once upon a time, in the town of Varn, there lived a fox named Edda. "
FRIEND = "Her best friend was an owl called Bors. "


@pytest.mark.parametrize(
    ("told", "strangers"),
    [
        ("Edda and Bors went to the caves of Lim. Then Edda walked home to Varn.", ()),
        ("Edda and Bors went to the caves of Lim. The cook of Lim gave some soup to a bear called Tarn.", ("Tarn",)),
        ("Edda saw the caves of Lim and the hills of Quist.", ("Quist",)),
        ("They went to the caves of Lim. The hills of Lim were cold.", ("Lim",)),
        ("They knocked at the door of Hild. Hild opened it.", ("Hild", "Hild")),
        ("Edda called Hild.", ("Hild",)),
        ("The people in Edda cheered.", ("Edda",)),
        ('"Come in," said Varn.', ("Varn",)),
        ("The wind blew in Edda's coat.", ()),
    ],
    ids=["none", "a third person", "a third place", "a place renamed", "a door's owner", "somebody called",
         "a person as a place", "a place that speaks", "a person's coat"],
)  # fmt: skip
def test_the_consistency_check_finds_who_was_not_introduced_and_who_changes_roles(told, strangers):
    assert check_story(OPENING + FRIEND + told).strangers == strangers


def test_a_name_before_its_introduction_fails_the_consistency_check():
    verdict = check_story(OPENING + "Every day Edda played with Bors. " + FRIEND + "Edda liked Bors.")
    assert verdict.strangers == ("Bors",)
    assert not verdict.consistent


@pytest.mark.parametrize(
    ("told", "agrees"), [("She sang.", True), ("She sang to himself.", False), ("Rain fell.", None)]
)
def test_a_story_without_pronouns_says_nothing_about_whether_they_agree(told, agrees):
    assert check_story(OPENING + told).pronouns_agree is agrees


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
