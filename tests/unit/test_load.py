import asyncio
import math
import statistics
from itertools import pairwise

import numpy as np
import pytest

from axon_llm.errors import UsageError
from axon_llm.serving.load import Run, Workload, arrivals
from axon_llm.serving.load_client import Sample, Target, first_model, measure
from axon_llm.serving.load_picture import draw_run, draw_sweep
from axon_llm.serving.load_report import Objective, percentile, report


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
    for bad in ("h:1", "ftp://h", "http://"):
        with pytest.raises(UsageError):
            Target.of(bad)
    assert "secret" not in repr(Target.of("http://h", "secret"))


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
