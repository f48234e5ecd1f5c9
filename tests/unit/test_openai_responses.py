from axon_llm.serving.openai_responses import Answer
from axon_llm.serving.wire import ErrorInfo, LogEntry, Terminal, TopLogprob, UsageInfo

USAGE = UsageInfo(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
STOP = Terminal(finish_reason="stop", usage=USAGE)


def test_text_held_back_makes_no_chunk_and_the_role_waits_for_the_first_text() -> None:
    answer = Answer("chatcmpl-1", "m", 5.9, chat=True)
    assert answer.chunk(LogEntry(seq=1, token=1)) is None
    first = answer.chunk(LogEntry(seq=2, token=2, text="hi"))
    assert first is not None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "hi"}
    assert (first["created"], first["sequence"], first["object"]) == (5, 2, "chat.completion.chunk")
    later = answer.chunk(LogEntry(seq=3, token=2, text="!"))
    assert later is not None
    assert "role" not in later["choices"][0]["delta"]


def test_an_answer_without_any_text_still_has_one_chunk_with_role_and_reason() -> None:
    chunk = Answer("chatcmpl-1", "m", 0, chat=True).chunk(LogEntry(seq=1, token=2, terminal=STOP))
    assert chunk is not None
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunk["choices"][0]["finish_reason"] == "stop"


def test_a_resumed_stream_does_not_say_the_role_again() -> None:
    chunk = Answer("chatcmpl-1", "m", 0, chat=True, resumed=True).chunk(LogEntry(seq=9, token=2, text="x"))
    assert chunk is not None
    assert chunk["choices"][0]["delta"] == {"content": "x"}


def test_an_error_is_no_chunk() -> None:
    error = ErrorInfo(type="server_error", code="c", message="m", http_status=500)
    entry = LogEntry(seq=1, terminal=Terminal(finish_reason="error", error=error))
    assert Answer("cmpl-1", "m", 0, chat=False).chunk(entry) is None


def test_usage_is_openais_with_cached_tokens() -> None:
    answer = Answer("cmpl-1", "m", 0, chat=False, include_usage=True)
    chunk = answer.usage_chunk(STOP)
    assert chunk is not None
    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert Answer("cmpl-1", "m", 0, chat=False).usage_chunk(STOP) is None


def test_a_whole_answer_is_the_chunks_put_together() -> None:
    entries = [
        LogEntry(seq=1, token=1, text="a"),
        LogEntry(seq=2, token=1),
        LogEntry(seq=3, token=2, text="b", terminal=STOP),
    ]
    whole = Answer("chatcmpl-1", "m", 0, chat=True).whole(entries, STOP)
    assert whole["choices"][0]["message"]["content"] == "ab"
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["total_tokens"] == 5


def test_logprobs_name_the_chosen_token_where_its_text_is_held_back_and_it_is_no_alternative() -> None:
    other = TopLogprob(token=7, logprob=-0.1, text=" can")
    entries = [
        LogEntry(seq=1, token=1, text="", token_text=" I", logprob=-2.0, top_logprobs=(other,)),
        LogEntry(seq=2, token=7, text=" I can", token_text=" can", logprob=-0.1, top_logprobs=(other,), terminal=STOP),
    ]
    chat = Answer("chatcmpl-1", "m", 0, chat=True).whole(entries, STOP)["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in chat] == [" I", " can"]
    assert chat[0]["bytes"] == list(b" I")
    assert [[top["token"] for top in item["top_logprobs"]] for item in chat] == [[" can"], [" can"]]
    text = Answer("cmpl-1", "m", 0, chat=False).whole(entries, STOP)["choices"][0]["logprobs"]
    assert text["tokens"] == [" I", " can"]
    assert text["top_logprobs"] == [{" can": -0.1, " I": -2.0}, {" can": -0.1}]
    assert text["text_offset"] == [0, 2]


def test_the_bytes_of_tokens_make_up_the_text_though_one_is_half_a_character_and_one_is_special() -> None:
    halves = [
        LogEntry(seq=1, token=1, token_text="\ufffd", token_bytes=(0xC3,), logprob=-1.0),
        LogEntry(seq=2, token=2, text="é", token_text="\ufffd", token_bytes=(0xA9,), logprob=-1.0),
        LogEntry(seq=3, token=3, text="!", token_text="!", logprob=-1.0),
        LogEntry(seq=4, token=4, token_text="<end>", token_bytes=(), logprob=-1.0, terminal=STOP),
    ]
    chat = Answer("chatcmpl-1", "m", 0, chat=True).whole(halves, STOP)["choices"][0]
    told = b"".join(bytes(item["bytes"]) for item in chat["logprobs"]["content"])
    assert told.decode() == chat["message"]["content"] == "é!"
    text = Answer("cmpl-1", "m", 0, chat=False).whole(halves, STOP)["choices"][0]["logprobs"]
    assert text["text_offset"] == [0, 0, 1, 2]
    assert text["tokens"][-1] == "<end>"


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    answer = Answer("cmpl-1", "m", 0, chat=False)
    chunks = [answer.chunk(LogEntry(seq=seq, token=1, text="ab", token_text="ab", logprob=-1.0)) for seq in (1, 2, 3)]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks if chunk] == [[0], [2], [4]]


def test_of_two_alternatives_with_one_text_the_likelier_counts() -> None:
    top = (TopLogprob(token=5, logprob=-0.1, text="a"), TopLogprob(token=6, logprob=-4.0, text="a"))
    entry = LogEntry(seq=1, token=6, text="a", token_text="a", logprob=-4.0, top_logprobs=top, terminal=STOP)
    text = Answer("cmpl-1", "m", 0, chat=False).whole([entry], STOP)["choices"][0]["logprobs"]
    assert text["top_logprobs"] == [{"a": -0.1}]
