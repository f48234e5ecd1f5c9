"""``axon serve``: one process, no servers; and that its answers are the engine's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from axon_llm.serving import serve as program
from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.served_model import ServedModel
from tests.faults import tiny_engine
from tests.integration.servers import free_port, wait_until
from tests.processes import ended

ROOT = Path(__file__).resolve().parents[2]
MODEL = "random:tiny"


class Serve:
    """One ``axon serve``."""

    def __init__(self, log_path: Path, *arguments: str, **environment: str) -> None:
        self.log_path = log_path
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "serve", "--port", str(self.port), *arguments],
                cwd=ROOT,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": os.environ.get("HOME", "/"),
                    "OMP_NUM_THREADS": "1",
                    **environment,
                },
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_listening(self) -> None:
        def listening() -> bool:
            assert self.process.poll() is None, self.log
            return "Ctrl-C ends it" in self.log

        wait_until(listening, 120, "axon serve listens")

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=api_key, max_retries=0, timeout=60)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    running = Serve(tmp_path_factory.mktemp("serve") / "log", "-m", MODEL)
    try:
        running.wait_listening()
        yield running
    finally:
        running.stop()


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_the_printed_curl_line_works(serve: Serve) -> None:
    line = re.search(r"curl .*?true\}'", serve.log, re.DOTALL)
    assert line is not None
    ran = subprocess.run(["bash", "-c", line[0]], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.startswith("data: {")
    assert ran.stdout.endswith("data: [DONE]\n\n")


def test_streamed_and_whole_answers_are_the_engines_own(serve: Serve) -> None:
    import axon_llm
    from axon_llm.engine.params import SamplingParams

    model, tokenizer = axon_llm.load(MODEL)
    engine = axon_llm.Engine(model, tokenizer)
    prompt = tokenizer.encode_chat(said("what is it"))
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=11)
    expected = "".join(event.text for event in engine.generate(prompt, params))
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": said("what is it"),
        "max_tokens": 24,
        "temperature": 0.8,
        "seed": 11,
    }
    whole = serve.client().chat.completions.create(**options)
    assert whole.choices[0].message.content == expected
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(prompt)
    stream = serve.client().chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_a_prompt_seen_before_is_found_in_the_cache(serve: Serve) -> None:
    ask = {"model": MODEL, "prompt": "the same long beginning " * 8, "max_tokens": 4, "seed": 1}
    first = serve.client().completions.create(**ask)
    again = serve.client().completions.create(**ask)
    assert again.choices[0].text == first.choices[0].text
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(serve: Serve) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        serve.client().completions.create(model=MODEL, prompt="word " * 600, max_tokens=100)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in str(caught.value).replace(",", "")


def test_an_answer_without_max_tokens_ends_where_the_context_does(serve: Serve) -> None:
    prompt = [7] * 2040
    answer = serve.client().completions.create(model=MODEL, prompt=prompt, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_many_at_once_get_what_each_would_get_alone(serve: Serve) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(seed: int) -> str:
        answer = serve.client().chat.completions.create(
            model=MODEL, messages=said(f"number {seed}"), max_tokens=16, seed=seed
        )
        return answer.choices[0].message.content or ""

    alone = [ask(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_a_session_remembers_and_its_history_is_found_in_the_cache(serve: Serve) -> None:
    cached, prompts = [], []
    for turn in range(5):
        answer = serve.client().chat.completions.create(
            model=MODEL,
            messages=said(f"turn {turn}"),
            max_tokens=8,
            seed=turn,
            extra_body={"session_id": "five", "logit_bias": {str(token): -100 for token in range(259, 512)}},
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        prompts.append(answer.usage.prompt_tokens)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert prompts == sorted(set(prompts)), "each turn's prompt holds the turns before"
    # All of the turn before but its answer is the same tokens for certain; the answer's text may be other tokens.
    assert all(found >= before - 8 for found, before in zip(cached[1:], prompts, strict=False))
    turns = httpx.get(serve.url + "/v1/sessions/five").json()["turns"]
    assert [turn["messages"][0]["content"] for turn in turns] == [f"turn {turn}" for turn in range(5)]


def test_a_key_from_the_environment_is_asked_for_and_never_shown(tmp_path: Path) -> None:
    running = Serve(tmp_path / "log", "-m", MODEL, AXON_API_KEY="a-key-of-some-length")
    try:
        running.wait_listening()
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").models.list()
        assert httpx.get(running.url + "/v1/models").status_code == 401
        assert httpx.get(running.url + "/health").status_code == 200
        assert [model.id for model in running.client("a-key-of-some-length").models.list()] == [MODEL]
        arguments = Path(f"/proc/{running.process.pid}/cmdline").read_text()
        assert "a-key-of-some-length" not in arguments + running.log
    finally:
        running.stop()


def test_a_key_from_a_file_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    running = Serve(tmp_path / "log", "-m", MODEL, "--api-key-file", str(tmp_path / "key"), "--served-as", "mine")
    try:
        running.wait_listening()
        assert [model.id for model in running.client("from-a-file").models.list()] == ["mine"]
        assert httpx.get(running.url + "/v1/models").status_code == 401
    finally:
        running.stop()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_ends_at_once_and_tidily(tmp_path: Path, number: int, status: int) -> None:
    running = Serve(tmp_path / "log", "-m", MODEL)
    try:
        running.wait_listening()
        assert running.client().models.list()
        running.process.send_signal(number)
        assert running.process.wait(20) == status
        assert "Traceback" not in running.log
    finally:
        running.stop()


def test_a_server_whose_engine_dies_ends_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_LOOK_S", 0.05)

    class Broken(tiny_engine.TinyEngine):
        def step(self) -> list[Any]:
            raise RuntimeError("the device is gone")

    statuses = []

    def ask(url: str, metrics_port: int) -> None:
        def post() -> None:
            with contextlib.suppress(httpx.HTTPError):
                body = {"model": tiny_engine.MODEL, "prompt": "hi", "max_tokens": 3}
                statuses.append(httpx.post(url + "/v1/completions", json=body, timeout=20).status_code)

        threading.Thread(target=post).start()

    served = ServedModel(Broken(4, 0.0), tiny_engine.encode, tiny_engine.spell, (tiny_engine.model_card(),))
    settings = SessionManagerSettings(port=0, metrics_port=0, drain_s=1)
    with pytest.raises(RuntimeError, match="the device is gone"):
        program.run(settings, lambda: served, ask)
    assert 200 not in statuses


def test_the_metrics_of_server_and_engine_are_on_a_port_of_their_own() -> None:
    shown: list[str] = []

    def look(url: str, metrics_port: int) -> None:
        def get() -> None:
            body = {"model": tiny_engine.MODEL, "prompt": "hi", "max_tokens": 3}
            assert httpx.post(url + "/v1/completions", json=body, timeout=20).status_code == 200
            shown.append(httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=get).start()

    served = ServedModel(
        tiny_engine.TinyEngine(4, 0.0), tiny_engine.encode, tiny_engine.spell, (tiny_engine.model_card(),)
    )
    assert program.run(SessionManagerSettings(port=0, metrics_port=0), lambda: served, look) == signal.SIGTERM
    [text] = shown
    for line in (
        "axon_jobs_submitted_total 1.0",
        "axon_session_manager_ttft_seconds_count 1.0",
        "axon_open_streams 0.0",
        "axon_generated_tokens_total 3.0",
        "axon_slots 4.0",
    ):
        assert f"\n{line}\n" in text, line


def test_a_model_that_is_not_there_is_exit_3_and_one_line(tmp_path: Path) -> None:
    running = Serve(tmp_path / "log", "-m", "no-such-model")
    with ended(running.process):
        assert running.process.wait(60) == 3
    assert "no-such-model" in running.log
    assert "Traceback" not in running.log
    assert running.log.count("axon: error: ") == 1


def test_a_port_that_is_taken_is_exit_2_before_the_model_is_loaded(serve: Serve, tmp_path: Path) -> None:
    second = Serve(tmp_path / "log", "-m", "no-such-model", "--port", str(serve.port))
    with ended(second.process):
        assert second.process.wait(60) == 2
    assert "Cannot listen" in second.log


def test_load_measures_it_and_draws_a_picture(serve: Serve, tmp_path: Path) -> None:
    picture = tmp_path / "load.svg"
    ran = subprocess.run(
        f"{sys.executable} -m cli.main load {serve.url} -n 8 --request-rate 50 --output-len 6 --input-len 10 --json "
        f"--plot {picture} --goodput ttft:60000".split(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = json.loads(ran.stdout)
    assert result["schema"] == "axon.load/1"
    assert (result["completed"], result["failed"]) == (8, 0)
    assert result["total_output_tokens"] == 8 * 6
    assert result["goodput_fraction"] == 1.0
    assert result["p99_ttft_ms"] >= result["p50_ttft_ms"] > 0
    assert picture.read_text().startswith("<svg")


def test_the_fifth_turn_of_a_session_depends_on_the_first_and_prefills_only_what_is_new(tmp_path: Path) -> None:
    running = Serve(tmp_path / "log", "-m", "axon-tiny")
    try:
        running.wait_listening()
        answers = {}
        for name in ("Anna", "Peter"):
            prompt_tokens = 0
            turns = (
                f"My name is {name}.",
                "I live near a lake.",
                "Do you like stories?",
                "Do you eat?",
                "What is my name?",
            )
            for text in turns:
                answer = running.client().chat.completions.create(
                    model="axon-tiny",
                    messages=said(text),
                    temperature=0,
                    max_tokens=40,
                    extra_body={"session_id": f"of-{name}"},
                )
                assert answer.usage is not None
                assert answer.usage.prompt_tokens_details is not None
                # Everything up to the question before is still in its slot; of the answer to it, at least that much.
                assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= prompt_tokens
                prompt_tokens = answer.usage.prompt_tokens
            answers[name] = answer.choices[0].message.content
        assert answers["Anna"] != answers["Peter"]
    finally:
        running.stop()
