"""The routes of the management API: each operation of the table with its handler, and the frame that all of them share."""

import functools
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from lmaas.api import (
    adapters,
    base_models,
    batches,
    conversations,
    files,
    message_batches,
    replicas,
    responses,
    sessions,
    table,
    tenants,
    usage,
    webhooks,
)
from lmaas.api.context import Api, ApiCall, Handler, WithStatus
from lmaas.api.decoding import decode
from lmaas.api.operation import Operation, Place
from lmaas.audit import Audit
from lmaas.http import ROUTE, limited, parse_json
from lmaas.types import Principal

MAX_JSON_BYTES = 64 * 1024

HANDLERS: Mapping[str, Handler] = {
    operation.id: handler
    for operation, handler in (
        (table.LIST_ADAPTERS, adapters.list_adapters),
        (table.UPLOAD_ADAPTER, adapters.upload_adapter),
        (table.GET_ADAPTER, adapters.get_adapter),
        (table.DELETE_ADAPTER, adapters.delete_adapter),
        (table.LIST_VERSIONS, adapters.list_versions),
        (table.ACTIVATE_VERSION, adapters.activate_version),
        (table.CHECK_ADAPTER, adapters.check_adapter),
        (table.LIST_KEYS, tenants.list_keys),
        (table.CREATE_KEY, tenants.create_key),
        (table.CHANGE_KEY, tenants.change_key),
        (table.REVOKE_KEY, tenants.revoke_key),
        (table.GET_OWN_TENANT, tenants.get_own_tenant),
        (table.CREATE_SESSION, sessions.create_session),
        (table.SHOW_SESSION, sessions.show_session),
        (table.END_SESSION, sessions.end_session),
        (table.CREATE_OPERATOR_SESSION, sessions.create_operator_session),
        (table.SHOW_OPERATOR_SESSION, sessions.show_session),
        (table.END_OPERATOR_SESSION, sessions.end_session),
        (table.GET_RESPONSE, responses.get_response),
        (table.DELETE_RESPONSE, responses.delete_response),
        (table.CANCEL_RESPONSE, responses.cancel_response),
        (table.LIST_INPUT_ITEMS, responses.list_input_items),
        (table.CREATE_CONVERSATION, conversations.create_conversation),
        (table.GET_CONVERSATION, conversations.get_conversation),
        (table.CHANGE_CONVERSATION, conversations.change_conversation),
        (table.DELETE_CONVERSATION, conversations.delete_conversation),
        (table.ADD_ITEMS, conversations.add_items),
        (table.LIST_ITEMS, conversations.list_items),
        (table.GET_ITEM, conversations.get_item),
        (table.DELETE_ITEM, conversations.delete_item),
        (table.CREATE_FILE, files.create_file),
        (table.LIST_FILES, files.list_files),
        (table.GET_FILE, files.get_file),
        (table.GET_FILE_CONTENT, files.get_content),
        (table.DELETE_FILE, files.delete_file),
        (table.CREATE_BATCH, batches.create_batch),
        (table.LIST_BATCHES, batches.list_batches),
        (table.GET_BATCH, batches.get_batch),
        (table.CANCEL_BATCH, batches.cancel_batch),
        (table.CREATE_MESSAGE_BATCH, message_batches.create_message_batch),
        (table.LIST_MESSAGE_BATCHES, message_batches.list_message_batches),
        (table.GET_MESSAGE_BATCH, message_batches.get_message_batch),
        (table.CANCEL_MESSAGE_BATCH, message_batches.cancel_message_batch),
        (table.DELETE_MESSAGE_BATCH, message_batches.delete_message_batch),
        (table.MESSAGE_BATCH_RESULTS, message_batches.message_batch_results),
        (table.LIST_WEBHOOKS, webhooks.list_webhooks),
        (table.CREATE_WEBHOOK, webhooks.create_webhook),
        (table.GET_WEBHOOK, webhooks.get_webhook),
        (table.CHANGE_WEBHOOK, webhooks.change_webhook),
        (table.DELETE_WEBHOOK, webhooks.delete_webhook),
        (table.ROTATE_WEBHOOK_SECRET, webhooks.rotate_secret),
        (table.TEST_WEBHOOK, webhooks.send_test),
        (table.LIST_DELIVERIES, webhooks.list_deliveries),
        (table.GET_DELIVERY, webhooks.get_delivery),
        (table.REDELIVER, webhooks.redeliver),
        (table.LIST_OPERATOR_KEYS, tenants.list_keys),
        (table.CREATE_OPERATOR_KEY, tenants.create_key),
        (table.REVOKE_OPERATOR_KEY, tenants.revoke_key),
        (table.LIST_TENANTS, tenants.list_tenants),
        (table.CREATE_TENANT, tenants.create_tenant),
        (table.GET_TENANT, tenants.get_tenant),
        (table.CHANGE_TENANT, tenants.change_tenant),
        (table.DELETE_TENANT, tenants.delete_tenant),
        (table.LIST_MODELS, base_models.list_models),
        (table.CREATE_MODEL, base_models.create_model),
        (table.GET_MODEL, base_models.get_model),
        (table.CHANGE_MODEL, base_models.change_model),
        (table.DELETE_MODEL, base_models.delete_model),
        (table.LIST_REPLICAS, replicas.list_replicas),
        (table.GET_REPLICA, replicas.get_replica),
        (table.STOP_REPLICA, replicas.stop_replica),
        (table.REPORT_USAGE, usage.report_usage),
        (table.LIST_EVENTS, usage.list_events),
        (table.REPORT_ALL_USAGE, usage.report_all_usage),
        (table.LIST_ALL_EVENTS, usage.list_all_events),
        (table.CHECK_USAGE, usage.check_usage),
        (table.REPORT_COGS, usage.report_cogs),
    )
}


def routes(api: Api, spec: dict[str, Any]) -> list[BaseRoute]:
    """Return the routes of the management API, and of the OpenAPI document `spec`."""
    by_path: dict[str, dict[str, Place]] = {}
    for place in table.PLACES:
        by_path.setdefault(place.path, {})[place.operation.method] = place

    # Encoded once: the document is large, and needs no key.
    encoded = msgspec.json.encode(spec)

    async def openapi(_: Request) -> Response:
        return Response(encoded, media_type="application/json")

    return [
        Route("/openapi.json", openapi),
        *(Route(path, functools.partial(_dispatch, api, places), methods=list(places)) for path, places in by_path.items()),
    ]


async def _dispatch(api: Api, places: Mapping[str, Place], request: Request) -> Response:
    # Starlette adds HEAD to GET.
    place = places["GET" if request.method == "HEAD" else request.method]
    request.scope[ROUTE] = place.path
    return await serve(api, place, request)


async def serve(api: Api, place: Place, request: Request) -> Response:
    """Serve one request: check its permission, decode its query and body, call the handler, and encode its answer, unless that is a
    response already.

    Raises LmaasError.
    """
    operation = place.operation
    owner, principal = await api.allowed(place, request)
    query = None if operation.query is None else decode(operation.query, dict(request.query_params), text=True)
    call: ApiCall[Any, Any] = ApiCall(
        owner, principal, request.path_params, await _body(api, operation, request), query, _audit(operation, principal, request), request
    )
    answered = await HANDLERS[operation.id](api, call)
    if isinstance(answered, Response):
        return answered
    answer, status = (answered.answer, answered.status) if isinstance(answered, WithStatus) else (answered, operation.status)
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


async def _body(api: Api, operation: Operation, request: Request) -> Any:
    # The handler itself reads a form, whose files stream to disk, and what else may be long.
    if operation.body is None or operation.files or operation.reads_body:
        return None
    limit_bytes = api.settings.max_body_bytes if operation.texts else MAX_JSON_BYTES
    text = await Request(request.scope, limited(request.receive, request.scope, limit_bytes)).body()
    return decode(operation.body, parse_json(text, texts=operation.texts) if text.strip() else {})


def _audit(operation: Operation, principal: Principal, request: Request) -> Audit | None:
    if operation.audit is None:
        return None
    return Audit(operation.audit, principal.role.value, principal.key_id, request.scope["request_id"])
