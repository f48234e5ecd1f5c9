"""``axon keys``: make, list and revoke API keys. Needs Redis (``AXON_REDIS_URL``, or the one on this machine)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from axon_llm.serving.keys import ApiKey, KeyStore

Result = TypeVar("Result")

command = typer.Typer(help="Make, list and revoke API keys.", add_completion=False, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@command.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; tenants share nothing.")],
    label: Annotated[str, typer.Option(help="A note for people.")] = "",
    rate: Annotated[
        float | None, typer.Option(help="Requests per minute of this tenant, instead of the server's default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is shown this once; only a hash is kept."""
    key, text = _with_store(lambda store: store.create(tenant, label, rate))
    if as_json:
        typer.echo(json.dumps({"schema": "axon.keys.create/1", "key": text, **_shape(key)}))
        return
    typer.echo(f"Key {key.id} of tenant {key.tenant}, in {_redis()}; it will not be shown again:", err=True)
    typer.echo(text)


@command.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List keys: ids, tenants and dates, never secrets."""
    keys = _with_store(lambda store: store.list())
    if as_json:
        typer.echo(json.dumps({"schema": "axon.keys.list/1", "keys": [_shape(key) for key in keys]}))
        return
    for key in keys:
        state = "active" if key.revoked_unix_s is None else f"revoked {_date(key.revoked_unix_s)}"
        rate = "" if key.rate_per_minute is None else f"{key.rate_per_minute:g}/min"
        typer.echo("\t".join((key.id, key.tenant, state, f"created {_date(key.created_unix_s)}", rate, key.label)))


@command.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id between the underscores of the key, as listed.")],
    as_json: AsJson = False,
) -> None:
    """Stop a key being accepted, from the next request on."""
    from axon_llm.errors import UsageError

    if not _with_store(lambda store: store.revoke(key_id)):
        raise UsageError("There is no key of that id.", "See `axon keys list`; the id, not the whole key.")
    if as_json:
        typer.echo(json.dumps({"schema": "axon.keys.revoke/1", "id": key_id, "revoked": True}))
    else:
        typer.echo(f"Key {key_id} is revoked, in {_redis()}.", err=True)


def _with_store(work: Callable[[KeyStore], Awaitable[Result]]) -> Result:
    from axon_llm.serving.keys import KeyStore
    from axon_llm.serving.redis_client import asyncio_client
    from axon_llm.serving.settings import ServingSettings, read_settings

    settings = read_settings(ServingSettings)

    async def run() -> Result:
        store = KeyStore(asyncio_client(settings))
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def _redis() -> str:
    from axon_llm.serving.settings import read_settings

    place: str = read_settings().redis_place
    return place


def _shape(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "label": key.label,
        "created_unix_s": key.created_unix_s,
        "revoked_unix_s": key.revoked_unix_s,
        "rate_per_minute": key.rate_per_minute,
    }


def _date(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")
