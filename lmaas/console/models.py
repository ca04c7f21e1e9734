"""The models that a page offers to choose from."""

from typing import Any

from lmaas.api.table import LIST_ADAPTERS, LIST_MODELS
from lmaas.console.api import ApiClient, read
from lmaas.console.page import Visit

#: The names that a list of suggestions has at most.
MAX_SUGGESTED = 50
GENERATE = "generate"


async def base_models(visit: Visit) -> list[dict[str, Any]]:
    """Return the base models, each with its `id`, which is the name that requests use, and its `kind`. Those that generate text come first.

    Raises ApiError.
    """
    return sorted(await _listed(visit), key=lambda model: model["kind"] != GENERATE)


async def _listed(visit: Visit) -> list[dict[str, Any]]:
    if visit.person.is_operator:
        found = await visit.api.send(LIST_MODELS)
        return [{"id": model["name"], "kind": model["kind"]} for model in found["data"]]
    async with visit.api.stream("GET", "/v1/models", query={"adapters": False}) as response:
        await response.aread()
        models: list[dict[str, Any]] = read(response)["data"]
        return models


async def adapter_names(api: ApiClient, search: str) -> list[tuple[str, str]]:
    """Return names of the tenant's adapters that contain `search`, each with its base model. Raises ApiError."""
    found = await api.send(LIST_ADAPTERS, query={"search": search[:63], "limit": MAX_SUGGESTED})
    return [(adapter["name"], adapter["base_model"]) for adapter in found["data"]]
