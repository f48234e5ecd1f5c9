"""API keys and rates in Redis, and ``axon keys``."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from axon_llm.errors import UsageError
from axon_llm.serving.keys import KeyStore
from axon_llm.serving.ports import StoreUnavailable
from axon_llm.serving.rate_limit import RateLimit
from axon_llm.serving.redis_client import asyncio_client
from axon_llm.serving.settings import ServingSettings
from tests.integration.servers import RedisServer, free_port
from tests.needs import need

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    need("redis-server")
    running = RedisServer(tmp_path_factory.mktemp("keys"))
    running.start()
    yield running
    running.stop()


def with_client(url: str, work: Callable[[Any], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        client = asyncio_client(ServingSettings(redis_url=SecretStr(url), redis_timeout_s=1.0))
        try:
            return await work(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


def axon_keys(server: RedisServer, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "cli.main", "keys", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "AXON_REDIS_URL": server.url()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == status, ran.stderr
    return ran


def test_a_key_verifies_and_only_its_hash_is_stored(server: RedisServer) -> None:
    made: list[str] = []

    async def work(client: Any) -> None:
        store = KeyStore(client)
        key, text = await store.create("acme", "laptop")
        assert text.startswith(f"axk_{key.id}_")
        assert await store.verify(text) == key
        for wrong in (text[:-1], text + "A", text.upper(), text.replace(key.id, "0" * 16), "", "axk__", f" {text}"):
            assert await store.verify(wrong) is None
        made.append(text)

    with_client(server.url(), work)
    made.append(json.loads(axon_keys(server, "create", "acme", "--json").stdout)["key"])
    connection = redis.Redis.from_url(server.url(), decode_responses=True)
    stored = " ".join(
        str(connection.hgetall(name) if connection.type(name) == "hash" else connection.smembers(name))
        for name in connection.keys("*")
    )
    connection.close()
    for text in made:
        _, key_id, secret = text.split("_", 2)
        assert len(secret) == 43
        assert key_id in stored
        assert secret not in stored


def test_keys_are_made_listed_and_revoked_from_the_command_line(server: RedisServer) -> None:
    made = axon_keys(server, "create", "rival", "--label", "ci", "--rate", "30")
    key = made.stdout.strip()
    key_id = key.split("_")[1]
    assert "not be shown again" in made.stderr
    listed = {entry["id"]: entry for entry in json.loads(axon_keys(server, "list", "--json").stdout)["keys"]}
    assert (listed[key_id]["tenant"], listed[key_id]["label"], listed[key_id]["rate_per_minute"]) == ("rival", "ci", 30)
    assert key.split("_", 2)[2] not in json.dumps(listed)
    axon_keys(server, "revoke", key_id)
    assert "revoked" in next(line for line in axon_keys(server, "list").stdout.split("\n") if key_id in line)
    assert with_client(server.url(), lambda client: KeyStore(client).verify(key)) is None


def test_mistakes_on_the_command_line_are_told_and_are_exit_2(server: RedisServer) -> None:
    assert "no key" in axon_keys(server, "revoke", "0" * 16, status=2).stderr
    assert "tenant" in axon_keys(server, "create", "a{b}", status=2).stderr
    assert "rate" in axon_keys(server, "create", "a", "--rate", "-1", status=2).stderr


def test_without_redis_it_is_exit_4(tmp_path: Path) -> None:
    away = RedisServer(tmp_path)
    assert "Redis" in axon_keys(away, "list", status=4).stderr


def test_a_tenant_that_could_not_be_part_of_a_redis_key_is_refused(server: RedisServer) -> None:
    for tenant in ("", "a b", "a:b", "a\n", "{x}", "ä", "x" * 129):
        with pytest.raises(UsageError):
            with_client(server.url(), lambda client, tenant=tenant: KeyStore(client).create(tenant))


def test_a_burst_passes_and_the_next_waits_for_exactly_its_share(server: RedisServer) -> None:
    async def work(client: Any) -> None:
        rate = RateLimit(client, per_minute=6.0, burst_s=30)
        assert [await rate.wait_s("a") for _ in range(3)] == [0, 0, 0]
        wait_s = await rate.wait_s("a")
        assert 9.0 < wait_s <= 10.0  # one every ten seconds
        assert await rate.wait_s("a") <= wait_s  # a refused request costs nothing
        assert await rate.wait_s("b") == 0
        assert await rate.wait_s("c", per_minute=60_000) == 0

    with_client(server.url(), work)


def test_rates_survive_a_redis_that_has_forgotten_its_scripts(server: RedisServer) -> None:
    async def work(client: Any) -> None:
        rate = RateLimit(client, per_minute=60.0, burst_s=2)
        assert await rate.wait_s("forgetful") == 0
        await client.script_flush()
        assert await rate.wait_s("forgetful") == 0
        assert await rate.wait_s("forgetful") > 0

    with_client(server.url(), work)


def test_two_session_managers_count_the_same_requests(server: RedisServer) -> None:
    async def work(client: Any) -> None:
        one, two = (RateLimit(client, per_minute=1.0, burst_s=120) for _ in range(2))
        assert [await one.wait_s("shared"), await two.wait_s("shared")] == [0, 0]
        assert await one.wait_s("shared") > 0
        assert await two.wait_s("shared") > 0

    with_client(server.url(), work)


def test_no_redis_is_store_unavailable() -> None:
    async def work(client: Any) -> None:
        with pytest.raises(StoreUnavailable):
            await KeyStore(client).verify(f"axk_{'0' * 16}_{'a' * 43}")
        with pytest.raises(StoreUnavailable):
            await RateLimit(client, per_minute=1, burst_s=60).wait_s("a")

    with_client(f"redis://127.0.0.1:{free_port()}/0", work)


def test_more_commands_than_connections_wait_for_each_other(server: RedisServer) -> None:
    async def work(client: Any) -> None:
        await asyncio.gather(*(client.ping() for _ in range(500)))

    with_client(server.url(), work)
