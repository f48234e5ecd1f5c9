"""Private servers for a test session, and both implementations of the serving path's interfaces behind one fixture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from axon_llm.serving.settings import ServingSettings
from tests.integration.backends import Backend, EmbeddedBackend, RealBackend
from tests.integration.http_rig import http_backend, real_servers, rig  # noqa: F401 - fixtures
from tests.integration.servers import RabbitServer, RedisServer
from tests.needs import need


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    need("redis-server")
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        assert isinstance(server, RedisServer)
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to be hurt."""
    need("redis-server")
    with RedisServer(tmp_path / "redis") as started:
        assert isinstance(started, RedisServer)
        yield started


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    need("rabbitmq-server")
    with RabbitServer(tmp_path_factory.mktemp("rabbit")) as server:
        assert isinstance(server, RabbitServer)
        yield server


@pytest.fixture
def settings(redis_server: RedisServer, rabbit_server: RabbitServer) -> ServingSettings:
    """Settings for the session's servers, with short time-outs."""
    return settings_for(redis_server.url(), rabbit_server.url())


def settings_for(redis_url: str, amqp_url: str, **changes: object) -> ServingSettings:
    """Return settings with time-outs short enough for tests."""
    values: dict[str, object] = {
        "redis_url": SecretStr(redis_url),
        "amqp_url": SecretStr(amqp_url),
        "lease_s": 3.0,
        "takeover_silence_s": 1.0,
        "outbox_grace_s": 1.0,
        "poll_s": 0.5,
        "redis_timeout_s": 1.0,
        "start_timeout_s": 10.0,
    }
    return ServingSettings(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(params=["redis", "embedded"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """A store and a queue: the real ones, then the embedded ones."""
    made: Backend
    if request.param == "redis":
        redis_server: RedisServer = request.getfixturevalue("redis_server")
        rabbit_server: RabbitServer = request.getfixturevalue("rabbit_server")
        made = RealBackend(settings_for(redis_server.url(), rabbit_server.url()))
    else:
        made = EmbeddedBackend(settings_for("redis://unused", "amqp://unused"))
    yield made
    made.close()
