import asyncio
import json
import math
import re
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from axon_llm.errors import ServiceUnavailable, UsageError
from axon_llm.serving import load_compare
from axon_llm.serving.load import Run, Workload, arrivals
from axon_llm.serving.load_client import Sample, Target, first_model, measure
from axon_llm.serving.load_picture import draw_run, draw_sweep
from axon_llm.serving.load_report import Objective, percentile, report
from tests.unit.terminal import axon


def sample(due: float, ttft_s: float, gaps_s: list[float], error: str = "") -> Sample:
    chunks = [due + ttft_s]
    for gap in gaps_s:
        chunks.append(chunks[-1] + gap)
    return Sample(
        due, chunks=chunks, ended=chunks[-1], prompt_tokens=10, output_tokens=len(chunks), cached_tokens=4, error=error
    )


def run_of(*samples: Sample) -> Run:
    ended = max(s.ended for s in samples)
    return Run(Workload(model="m", num_prompts=len(samples)), math.inf, 2, 1.0, 0.0, ended, list(samples), 0.0)


def test_percentiles_are_numpys() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_arrivals_keep_the_rate_and_look_like_a_poisson_process() -> None:
    moments = arrivals(4001, per_s=20.0, burstiness=1.0, seed=3)
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert moments[-1] == pytest.approx(200.0)
    # An exponential distribution: as wide as its mean, and 63 % of it below.
    assert statistics.pstdev(gaps) == pytest.approx(0.05, rel=0.1)
    assert sum(gap < 0.05 for gap in gaps) / len(gaps) == pytest.approx(1 - math.exp(-1), abs=0.03)
    steady = arrivals(4001, per_s=20.0, burstiness=100.0, seed=3)
    assert statistics.pstdev([b - a for a, b in pairwise(steady)]) < 0.01


def test_arrivals_are_the_seeds() -> None:
    assert arrivals(50, 5.0, 1.0, seed=1) == arrivals(50, 5.0, 1.0, seed=1)
    assert arrivals(50, 5.0, 1.0, seed=1) != arrivals(50, 5.0, 1.0, seed=2)


def test_prompts_are_the_seeds_and_share_what_they_are_told_to() -> None:
    workload = Workload(model="m", num_prompts=5, input_words=20, shared_words=8, seed=4)
    bodies = workload.bodies()
    assert bodies == workload.bodies()
    assert len({body["messages"][0]["content"] for body in bodies}) == 1
    own = {body["messages"][1]["content"] for body in bodies}
    assert len(own) == 5
    assert all(len(text.split()) == 12 for text in own)


def test_a_report_has_the_known_names_and_the_right_figures() -> None:
    run = run_of(sample(0.0, 0.1, [0.02, 0.04]), sample(1.0, 0.3, [0.03, 0.03]), sample(1.5, 0.2, [], error="broken"))
    result = report(run, Objective(ttft_ms=200.0, tpot_ms=35.0), base_url="http://x/v1", detailed=True)
    assert (result["completed"], result["failed"], result["num_prompts"]) == (2, 1, 3)
    assert result["mean_ttft_ms"] == pytest.approx(200.0)
    assert result["median_tpot_ms"] == pytest.approx(30.0)
    assert result["p99_itl_ms"] == pytest.approx(np.percentile([20, 40, 30, 30], 99))
    assert result["total_input_tokens"] == 20
    assert result["total_output_tokens"] == 6
    assert result["request_throughput"] == pytest.approx(2 / 1.7)
    assert result["request_goodput"] == pytest.approx(1 / 1.7)  # one is too slow, one failed
    assert result["max_concurrent_requests"] == 1
    assert result["objective"]["p99_ttft_ms"]["met"] is False
    assert result["errors"] == ["broken"]
    vllm = {"duration", "output_throughput", "total_token_throughput", "std_e2el_ms", "ttfts", "itls", "input_lens"}
    assert vllm <= set(result)


def test_objectives_are_read_as_written() -> None:
    assert Objective.parse([]) == Objective(500.0, 30.0, None)
    assert Objective.parse(["ttft:100", "e2el:2000"]) == Objective(100.0, None, 2000.0)
    for bad in ("ttft", "ttft:-1", "itl:3", "tpot:NaN"):
        with pytest.raises(UsageError):
            Objective.parse([bad])


def test_pictures_hold_every_request_and_are_well_formed() -> None:
    from xml.etree import ElementTree

    run = run_of(sample(0.0, 0.1, [0.02] * 5), sample(0.2, 0.3, [0.03] * 5), sample(0.4, 0.1, [], error="<&>"))
    result = report(run, Objective(), base_url="http://x/v1")
    drawn = ElementTree.fromstring(draw_run(run, result))
    assert (
        len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == 5
    )  # two for each that was answered, one for the other
    ElementTree.fromstring(draw_sweep([result, {**result, "max_concurrency": 8}]))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1", "https://h/v1"),
        ("http://h/some/path", "http://h/some/path/v1"),
    ],
)
def test_v1_may_be_left_out(typed: str, meant: str) -> None:
    assert Target.of(typed).base_url == meant


def test_what_is_no_url_is_refused_and_a_key_is_not_shown() -> None:
    label = "a" * 64  # of a name; 63 is the most
    ports = ("http://127.0.0.1:99999", "http://h:0", "http://h:x")
    for bad in ("h:1", "ftp://h", "http://", "http://[::1", *ports, f"http://{label}", "http://h/é", "http://h/ v1"):
        with pytest.raises(UsageError) as refused:
            Target.of(bad)
        assert repr(bad) in refused.value.message
    assert "secret" not in repr(Target.of("http://h", "secret"))


@pytest.mark.parametrize("key", ["secre\xe9", "secre\n", "secre t"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match="Character 6 of the API key") as refused:
        Target.of("http://h", key)
    assert "secre" not in refused.value.message + refused.value.hint


def serve_once(answer: bytes, pieces: int) -> tuple[Sample, str]:
    """A server that says one thing to everybody, in so many pieces; what a client makes of it."""

    async def run() -> tuple[Sample, str]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            step = max(1, len(answer) // pieces)
            for start in range(0, len(answer), step):
                writer.write(answer[start : start + step])
                await writer.drain()
                await asyncio.sleep(0)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            target = Target.of(f"http://127.0.0.1:{port}")
            model = ""
            if b'"data"' in answer:
                model = await first_model(target)
            return await measure(target, "/completions", {"model": "m"}, 0.0, 5.0), model

    return asyncio.run(run())


STREAM = (
    b'data: {"choices":[{"text":"a"}]}\n\n: keep-alive\n\ndata: {"choices":[{"text":""}]}\n\n'
    b'data: {"choices":[{"text":"b"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_a_stream_is_read_whatever_pieces_it_comes_in(pieces: int) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(STREAM)
    got, _ = serve_once(head + STREAM, pieces)
    assert got.error == ""
    assert len(got.chunks) == 2
    assert (got.prompt_tokens, got.output_tokens) == (5, 3)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b'HTTP/1.1 429 X\r\ncontent-length: 28\r\n\r\n{"error":{"message":"slow"}}', "HTTP 429: slow"),
        (b"HTTP/1.1 502 X\r\ncontent-length: 3\r\n\r\nbad", "HTTP 502: bad"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 37\r\n\r\ndata: {"error":{"message":"broke"}}\n\n\n', "broke"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\ndata: [DONE]\n\n", "the answer held no text"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ndata: [DONE]\n\n", "peer"),
        (b"", "connection ended"),
    ],
)
def test_whatever_a_server_does_wrong_is_in_the_sample(answer: bytes, error: str) -> None:
    got, _ = serve_once(answer, 1)
    assert error in got.error, got.error


def stream(*chunks: bytes) -> bytes:
    """An answer of these chunks."""
    body = b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        (b"oops", "not a chunk of a completion: data: oops"),
        (b"5", "not a chunk of a completion: data: 5"),
        (b"null", "not a chunk of a completion"),
        (b'{"choices":[{"text":"caf\xe9"}]}', "not a chunk of a completion"),
        (b'{"choices":["a"]}', "not a chunk of a completion"),
        (b'{"choices":7}', "not a chunk of a completion"),
        (b"[" * 100_000, "not a chunk of a completion"),
        (b'{"error":"overloaded"}', "overloaded"),
        (b'{"error":{"message":null}}', "error in the stream"),
        (b'{"error":["slow"]}', "slow"),
    ],
)
def test_a_chunk_that_cannot_be_read_fails_its_request_alone(chunk: bytes, error: str) -> None:
    got, _ = serve_once(stream(b'{"choices":[{"text":"a"}]}', chunk), 1)
    assert error in got.error, got.error
    assert len(got.error) < 300


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error":"overloaded"}', "overloaded"),
        (b'{\n  "error": {\n    "message": "overloaded"\n  }\n}\n', "overloaded"),
        (b"overloaded\n", "overloaded\n"),
        (b"[" * 50_000, "[" * 200),
    ],
)
def test_a_refusal_is_shown_whatever_its_form(body: bytes, shown: str) -> None:
    got, _ = serve_once(b"HTTP/1.1 503 X\r\ncontent-length: %d\r\n\r\n" % len(body) + body, 1)
    assert got.error == f"HTTP 503: {shown}"


@pytest.mark.parametrize(
    "usage",
    [
        b"null",
        b"5",
        b"{}",
        b'{"prompt_tokens":null,"completion_tokens":null,"prompt_tokens_details":{"cached_tokens":null}}',
        b'{"prompt_tokens":"7","completion_tokens":1.5,"prompt_tokens_details":3}',
        b'{"prompt_tokens":-7,"completion_tokens":true,"prompt_tokens_details":{"cached_tokens":[]}}',
    ],
)
def test_what_is_null_or_no_number_counts_as_not_sent(usage: bytes) -> None:
    text = b'{"error":null,"choices":[{"text":"a","delta":null}],"usage":null}'
    got, _ = serve_once(stream(text, text, b'{"choices":null,"usage":%s}' % usage), 1)
    assert got.error == ""
    assert (got.prompt_tokens, got.output_tokens, got.cached_tokens) == (0, 2, 0)
    assert report(run_of(got), Objective(), base_url="http://x/v1")["total_output_tokens"] == 2


def test_a_server_that_lists_what_is_no_model_lists_none() -> None:
    for body in (b'{"data":[]}', b'{"data":5}', b'{"data":"caf\xe9"}', b'["data"' + b"[" * 50_000):
        with pytest.raises(ServiceUnavailable, match="lists no model"):
            serve_once(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-c", "inf"), "--max-concurrency"),
        (("-c", "0.5"), "--max-concurrency"),
        (("-c", "1,0"), "--max-concurrency"),
        (("-c", ""), "--max-concurrency"),
        (("--request-rate", "nan"), "--request-rate"),
        (("--request-rate", "5", "--burstiness", "inf"), "--burstiness"),
        (("--request-rate", "5", "--burstiness", "nan"), "--burstiness"),
        (("-t", "nan"), "--temperature"),
        (("--timeout", "inf"), "--timeout"),
        (("--plot", "x.png"), "--plot writes .svg, not '.png'"),
        (("--against", "http://there", "--plot", "x.svg", "--goodput", "ttft:500"), "leave --goodput, --plot out"),
        (("--against", "http://there", "--detailed"), "leave --detailed out"),
    ],
)
def test_a_load_that_nobody_can_make_is_a_usage_error(words: tuple[str, ...], says: str) -> None:
    result = axon("load", "http://127.0.0.1:9", "-m", "x", *words)
    assert result.code == 2
    assert says in result.err


def test_a_key_file_that_is_no_text_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    result = axon("load", "http://127.0.0.1:9", "-m", "x", "--api-key-file", str(tmp_path / "key"))
    assert result.code == 2
    assert "not text" in result.err


def test_a_comparison_with_a_server_that_fails_is_null_where_there_is_nothing_to_compare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run_load(target: Target, workload: Workload, **_: object) -> Run:
        broken = "down" if target.base_url == "http://there/v1" else ""
        return run_of(*(sample(0.0, 0.1, [0.02], error=broken) for _ in range(workload.num_prompts)))

    async def model(target: Target) -> str:
        raise AssertionError("one was named")

    monkeypatch.setattr(load_compare, "run_load", run_load)
    monkeypatch.setattr(load_compare, "first_model", model)
    words = ("load", "http://here", "-m", "m", "-n", "3", "--against", "http://there")
    result = axon(*words, "--json")
    assert result.code == 1
    found = json.loads(result.out, parse_constant=pytest.fail)  # NaN is no JSON
    assert found["p50_ttft_ms"] == {"here": pytest.approx(100.0), "against": None, "added": None}
    assert (found["completed"], found["failed"]) == ([3, 0], [0, 3])
    assert re.search(r"p50_ttft_ms +100\.00 +- +-\n", axon(*words).out)
