"""Checks of what a setup reaches over the network: the service with its credentials, and servers that the settings name."""

import json
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lmaas.api.table import LIST_OPERATOR_KEYS
from lmaas.cli.context import Context
from lmaas.cli.doctor.findings import Finding, judge_clock, judge_redis, ok, warning, wrong
from lmaas.config import Settings
from lmaas.errors import ApiError, LmaasError, SettingsError

if TYPE_CHECKING:
    from lmaas.manifests.client import ApiClient

REACH_S = 5
LEAST_POSTGRES = 15
#: The owner's permission bits are the only ones that a file of keys should have.
OTHERS = 0o077
_NOW = "SELECT extract(epoch FROM clock_timestamp())::float8, to_regclass('alembic_version') IS NOT NULL"
_REVISION = re.compile(r"(\d{4})_")


def check_credentials(settings: Settings, *, is_running: bool) -> Iterator[Finding]:
    """Check the keys that the commands use: the settings', or those in the credentials file of this stack."""
    if bool(settings.url) != bool(settings.api_key):
        yield wrong("credentials", "Only one of LMAAS_URL and LMAAS_API_KEY is set.", "Set both, or neither.")
        return
    if settings.url:
        yield ok("credentials", "The commands use LMAAS_URL and LMAAS_API_KEY.")
        return
    path = settings.credentials_path
    try:
        mode = path.stat().st_mode
        found = json.loads(path.read_text())
        _ = found["base_url"], found["operator_key"]
    except FileNotFoundError:
        if is_running:
            yield warning("credentials", f"There is no {path} yet.", "Wait until `lmaas up` has written it.")
        else:
            yield ok("credentials", f"There are none yet. `lmaas up` writes {path}.")
        return
    except (OSError, ValueError, LookupError, TypeError):
        yield wrong("credentials", f"{path} has no credentials that can be read.", "Remove it, and run `lmaas up`, which writes a new one.")
        return
    if mode & OTHERS:
        yield warning("credentials", f"Other users can read {path}.", f"Run: chmod 600 {path}")
    else:
        yield ok("credentials", f"{path} is there, and private.")


def check_service(context: Context, *, is_running: bool) -> Iterator[Finding]:
    """Check that the service responds, is ready, knows the key, and has the same time."""
    import httpx

    if not context.settings.url and not is_running:
        yield ok("service", f"No stack runs in {context.settings.home}. `lmaas up` starts one.")
        return
    try:
        client = context.client()
    except SettingsError:
        return  # There are no credentials, which is a finding already.
    try:
        client.check_ready()
        role = _role(client)
        if role is None:
            yield wrong("service", f"{client.address} refuses the key.", "Set LMAAS_API_KEY to a valid key; a revoked one stays refused.")
            return
        yield ok("service", f"{client.address} is ready, and knows the key, which is {role}.")
        yield _clock(client.address)
    except httpx.HTTPError as error:
        yield wrong("service", f"{client.address} stopped answering: {error}.", "Run this command again.")
    except SettingsError as error:
        yield wrong("service", error.message, "Check that it runs, and that this machine can reach it.")
    except (ApiError, LmaasError) as error:
        yield wrong("service", error.message, "Look at its logs: `lmaas logs --level warning`, on its machine.")
    finally:
        client.close()


def _role(client: "ApiClient") -> str | None:
    """Return in words what kind of key a client has; None if the service does not know it."""
    try:
        client.send(LIST_OPERATOR_KEYS, query={"limit": 1})
    except ApiError as error:
        if error.status == 401:
            return None
        if error.status != 403:
            raise
        return "a tenant's"
    return "an operator's"


def _clock(address: str) -> Finding:
    import httpx

    before = time.time()
    response = httpx.get(f"{address}/healthz", timeout=REACH_S, trust_env=False)
    now = (before + time.time()) / 2
    try:
        theirs = parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return warning("clock", f"{address} does not send its time.", "Check that no proxy removes the header Date.")
    # The header has whole seconds.
    return judge_clock("clock", "the service", theirs + 0.5 - now)


def check_database(settings: Settings) -> Iterator[Finding]:
    """Check the Postgres server of the settings: its response, release, schema and clock."""
    import psycopg

    if settings.database_url is None:
        return
    url = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", settings.database_url)
    try:
        with psycopg.connect(url, connect_timeout=REACH_S) as connection:
            release = connection.info.server_version // 10000
            row = connection.execute(
                "SELECT extract(epoch FROM clock_timestamp())::float8, to_regclass('alembic_version') IS NOT NULL"
            ).fetchone()
            now, has_schema = (time.time(), False) if row is None else row
            skew_s = now - time.time()
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone() if has_schema else None
    except psycopg.Error as error:
        why = " ".join(str(error).split())[:300].rstrip(".?")
        yield wrong("database", f"Postgres does not answer: {why}.", "Check LMAAS_DATABASE_URL, and that the server runs.")
        return
    if release < LEAST_POSTGRES:
        yield wrong("database", f"Postgres is release {release}.", f"Use release {LEAST_POSTGRES} or a newer one.")
    elif (newest := newest_revision()) is not None and (found is None or found[0] != newest):
        schema = "has no schema" if found is None else f"has the schema {found[0]}"
        yield wrong("database", f"Postgres {release} answers, but {schema}; this release needs {newest}.", "Run `lmaas migrate`.")
    else:
        yield ok("database", f"Postgres {release} answers, with the newest schema.")
    yield judge_clock("clock", "the database", skew_s)


def newest_revision(folder: Path | None = None) -> str | None:
    """Return the number of the newest migration of this release; None in an installation without migrations."""
    from lmaas.cli.doctor.machine import ROOT

    found = [match[1] for path in (folder or ROOT / "migrations" / "versions").glob("*.py") if (match := _REVISION.match(path.name))]
    return max(found, default=None)


def check_queue(settings: Settings) -> Finding | None:
    """Check the Redis or Valkey server of the settings."""
    import redis

    if settings.redis_url is None:
        return None
    try:
        with redis.Redis.from_url(
            settings.redis_url, socket_timeout=REACH_S, socket_connect_timeout=REACH_S, decode_responses=True
        ) as client:
            info = client.info()
    except ValueError:
        return wrong("queue", "LMAAS_REDIS_URL is not the URL of a server.", "Write it like redis://host:6379.")
    except redis.RedisError as error:
        why = str(error)[:300].rstrip(".")
        return wrong("queue", f"Redis does not answer: {why}.", "Check LMAAS_REDIS_URL, and that the server runs.")
    version = str(info.get("valkey_version") or info.get("redis_version") or "?")
    is_persistent = bool(info.get("aof_enabled"))
    return judge_redis(version, str(info.get("maxmemory_policy", "noeviction")), is_persistent=is_persistent)


def check_objects(settings: Settings) -> Finding | None:
    """Check the object store of the settings."""
    import asyncio

    from lmaas.store.objects import Objects

    if settings.object_store_url is None:
        return None
    where = urlsplit(settings.object_store_url)
    shown = f"{where.scheme}://{where.hostname or ''}{where.path}"

    async def look() -> None:
        async with asyncio.timeout(3 * REACH_S):
            await Objects(str(settings.object_store_url)).exists("lmaas-doctor")

    try:
        asyncio.run(look())
    except TimeoutError:
        return wrong("object store", f"{shown} does not answer within {3 * REACH_S} s.", "Check LMAAS_OBJECT_STORE_URL and the network.")
    except LmaasError as error:
        return wrong("object store", f"{shown}: {error.message}", "Check LMAAS_OBJECT_STORE_URL and the credentials of the store.")
    return ok("object store", f"{shown} answers.")
