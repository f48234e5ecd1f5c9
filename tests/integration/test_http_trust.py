"""Session managers without a gateway in front that check keys themselves; the rules are the gateway's."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from axon_llm.serving.http_auth import Keys
from tests.integration.http_rig import Rig, real_backend
from tests.integration.scripted_worker import MODEL
from tests.integration.servers import RabbitServer, RedisServer
from tests.integration.test_http_bad_input import CHAT


@pytest.fixture(scope="module")
def keyed(real_servers: tuple[RedisServer, RabbitServer]) -> Iterator[Rig]:
    backend = real_backend(*real_servers, trust="keys", rate_per_minute=6, rate_burst_s=400)
    worker = backend.make_worker()
    worker.start()
    running = backend.rig()
    yield running
    running.stop()
    worker.stop()


def key_of(rig: Rig, tenant: str) -> str:
    keys = rig.service.keys
    assert isinstance(keys, Keys)
    text: str = rig.ask(keys.keys.create(tenant))[1]
    return text


def test_a_key_opens_and_its_tenant_is_the_keys(keyed: Rig) -> None:
    mine, other = (openai.OpenAI(base_url=keyed.url + "/v1", api_key=key_of(keyed, t), max_retries=0) for t in "ab")
    answer = mine.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "count 1"}])
    headers = {"authorization": f"Bearer {other.api_key}", "x-axon-tenant": "a"}
    assert httpx.get(f"{keyed.url}/v1/jobs/{answer.id}", headers=headers).status_code == 404


@pytest.mark.parametrize("values", [[], ["Bearer nonsense"], ["Basic x"], ["Bearer"], ["twice"]])
def test_no_key_a_wrong_one_and_two_are_401_and_nothing_is_read(keyed: Rig, values: list[str]) -> None:
    good = f"Bearer {key_of(keyed, 'c')}"
    given = [good, good] if values == ["twice"] else values
    headers = [("authorization", value) for value in given]
    response = httpx.post(keyed.url + "/v1/chat/completions", content=b"not even JSON", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_tenant_over_its_rate_waits_as_long_as_it_is_told(keyed: Rig) -> None:
    headers = {"authorization": f"Bearer {key_of(keyed, 'hasty')}"}
    statuses = [
        httpx.post(keyed.url + "/v1/chat/completions", json=CHAT, headers=headers).status_code for _ in range(41)
    ]
    assert statuses == [200] * 40 + [429]
    refused = httpx.get(keyed.url + "/v1/models", headers=headers)
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_the_gateways_question_is_not_answered_here(keyed: Rig) -> None:
    assert httpx.get(keyed.url + "/internal/auth").status_code == 404
