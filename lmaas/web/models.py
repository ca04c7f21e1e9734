"""`/v1/models`, in Anthropic's shape for clients that send `anthropic-version`, otherwise in OpenAI's."""

import functools
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmaas.errors import ModelNotFound
from lmaas.http import PRINCIPAL, JsonResponse, api_key, speaks_anthropic
from lmaas.inference.catalog import Catalog, ListedModel
from lmaas.protocols.models import anthropic_model, anthropic_models, openai_model, openai_models, with_adapters
from lmaas.web.auth import Authenticator, tenant_of


def model_routes(authenticate: Authenticator, catalog: Catalog) -> list[Route]:
    """Return the routes of the list and of one model."""
    return [
        Route("/v1/models", functools.partial(_list, authenticate, catalog)),
        Route("/v1/models/{model:path}", functools.partial(_show, authenticate, catalog)),
    ]


async def _list(authenticate: Authenticator, catalog: Catalog, request: Request) -> Response:
    tenant_id = await _tenant(authenticate, request)
    models = await catalog.listed(tenant_id, adapters=with_adapters(request.query_params))
    return JsonResponse(anthropic_models(models, request.query_params) if speaks_anthropic(request.scope) else openai_models(models))


async def _show(authenticate: Authenticator, catalog: Catalog, request: Request) -> Response:
    tenant_id = await _tenant(authenticate, request)
    model = await _find(catalog, tenant_id, request.path_params["model"])
    return JsonResponse(anthropic_model(model) if speaks_anthropic(request.scope) else openai_model(model))


async def _tenant(authenticate: Authenticator, request: Request) -> str:
    principal = request.scope[PRINCIPAL] = await authenticate(api_key(request.scope["headers"]))
    return tenant_of(principal)


async def _find(catalog: Catalog, tenant_id: str, name: str) -> ListedModel:
    """Return a model by its plain name, or a version of it. Raises ModelNotFound."""
    served = await catalog.resolve(tenant_id, name)
    plain = name.partition("@")[0]
    for model in await catalog.listed(tenant_id):
        if model.name == plain:
            return model if name == plain else replace(model, name=name, created=served.created)
    if served.version is None:
        raise ModelNotFound(name)
    # A pinned version of an adapter that has no live one.
    return ListedModel(name, served.created, served.base.name, served.base.max_model_len, served.base.kind)
