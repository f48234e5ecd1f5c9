"""axon chat: reuse across turns, commands, a full context, and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from axon_llm import load
from axon_llm.engine.engine import Engine
from axon_llm.engine.params import SamplingParams
from axon_llm.errors import RequestError
from axon_llm.tokenizer import byte_tokenizer
from cli.conversation import Conversation
from tests.processes import ended
from tests.unit.terminal import TINY, axon
from tests.unit.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
GREEDY = ("-t", "0", "-n", "12")


def conversation(max_tokens: int = 8, max_seq_len: int = 200) -> Conversation:
    engine = Engine(tiny_model(), byte_tokenizer(), max_seq_len=max_seq_len)
    return Conversation(engine, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))


def say(chat: Conversation, text: str) -> str:
    return "".join(event.text for event in chat.answer(text))


def test_a_later_turn_reuses_what_earlier_ones_left_in_the_cache() -> None:
    result = axon("chat", *TINY, *GREEDY, stdin="hello\nand then\n")
    assert result.code == 0
    assert result.out.count("\n") >= 2
    first, second = re.findall(r"(\d+) prompt tokens(?: \((\d+) from the cache\))?", result.err)
    assert first[1] == ""
    assert int(second[1]) >= int(first[0]), "all of the first prompt was still there"
    assert int(second[1]) < int(second[0])


def test_an_answer_is_reused_in_the_tokens_it_was_spoken_in() -> None:
    model, tokenizer = load("axon-tiny", device="cpu", dtype="float32")
    wild = SamplingParams(max_tokens=40, temperature=3.0, seed=1, ignore_eos=True)
    chat = Conversation(Engine(model, tokenizer, max_seq_len=400), wild)
    answer = say(chat, "Tell me about Wexford.")
    first = chat.turns[0].usage
    assert first is not None
    anew = tokenizer.encode(answer, special=False)
    assert len(anew) != first.completion_tokens, "the tokenizer would have written it in other tokens"
    say(chat, "And then?")
    second = chat.turns[1].usage
    assert second is not None
    assert second.cached_tokens >= first.prompt_tokens + first.completion_tokens - 1


def test_commands_are_obeyed_and_not_sent_to_the_model() -> None:
    result = axon("chat", *TINY, *GREEDY, stdin="/help\nhello\n/stats\n/nonsense\n/reset\n/stats\n/exit\nnever read\n")
    assert result.code == 0
    assert result.err.count("generated (length)") == 1
    assert "/system TEXT" in result.err
    assert "turns: 1, 12 tokens generated" in result.err
    assert "no command /nonsense" in result.err
    assert "turns: 0, 0 tokens generated" in result.err


def test_answers_alone_are_on_standard_output() -> None:
    quiet = axon("chat", *TINY, *GREEDY, stdin="hello\n")
    assert axon("chat", *TINY, *GREEDY, stdin="/help\n/stats\n\n   \nhello\n/exit\n").out == quiet.out


def test_a_system_message_changes_the_prompt_and_begins_anew() -> None:
    chat = conversation()
    say(chat, "hi")
    [plain] = [turn.usage for turn in chat.turns]
    chat.system = "short"
    chat.reset()
    assert chat.messages == []
    say(chat, "hi")
    [told] = [turn.usage for turn in chat.turns]
    assert plain is not None
    assert told is not None
    assert told.prompt_tokens == plain.prompt_tokens + len("system: short\n")
    first = re.compile(r"(\d+) prompt tokens")
    from_words = [
        first.findall(axon("chat", *TINY, *GREEDY, *words, stdin="hi\n").err) for words in ((), ("--system", "short"))
    ]
    assert from_words == [[str(plain.prompt_tokens)], [str(told.prompt_tokens)]]


def test_messages_with_a_slash_in_front_and_over_several_lines_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    really = Conversation.answer

    def answer(self: Conversation, text: str, *more: Any) -> Any:
        heard.append(text)
        return really(self, text, *more)

    monkeypatch.setattr(Conversation, "answer", answer)
    sent = axon("chat", *TINY, *GREEDY, stdin="//etc is a folder\none \\\ntwo\n")
    assert sent.err.count("generated (length)") == 2
    assert heard == ["/etc is a folder", "one \ntwo"]


def test_a_full_context_drops_the_oldest_turns_and_keeps_answering() -> None:
    chat = conversation(max_tokens=8, max_seq_len=128)
    for _ in range(8):
        assert say(chat, "tell me more")
    assert chat.forgotten > 0
    assert chat.forgotten % 2 == 0, "question and answer go together"
    assert chat.messages[0]["role"] == "user"
    usage: Any = chat.turns[-1].usage
    assert usage.prompt_tokens + usage.completion_tokens <= 128


def test_a_message_that_cannot_fit_leaves_the_conversation_as_it_was() -> None:
    chat = conversation(max_seq_len=128)
    say(chat, "hi")
    before = list(chat.messages)
    with pytest.raises(RequestError, match="the context holds 128"):
        say(chat, "x" * 200)
    assert chat.messages == before
    assert say(chat, "still there?")


def test_a_cancelled_answer_stays_in_the_conversation_as_far_as_it_came() -> None:
    chat = conversation(max_tokens=100)
    started: list[str] = []
    pieces = []
    for event in chat.answer("hi", started.append):
        pieces.append(event.text)
        if event.index == 4 and event.finish_reason is None:
            chat.engine.cancel(started[0])
    assert chat.turns[-1].finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert say(chat, "go on")
    usage: Any = chat.turns[-1].usage
    assert usage.cached_tokens > 0


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    running = subprocess.Popen(
        [sys.executable, "-u", "-m", "cli.main", "chat", *TINY, "-t", "0", "-n", "2000"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with ended(running):
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"hello\n")
        running.stdin.flush()
        running.stdout.read(2)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(b"/stats\n", timeout=120)
        assert running.returncode == 0
        assert b"(cancelled)" in err
        assert b"turns: 1" in err
