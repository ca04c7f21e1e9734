"""The one table of operations of the management API.

Routes, permission checks, the decoding of bodies and queries, the OpenAPI document, the client and the audit records follow from it. The
handlers are in `lmaas.api.routes`, so that clients import this module without the server.

A new operation needs a row here, its types in `lmaas.api.shapes`, and its handler in `lmaas.api.routes.HANDLERS`. A test fails until it
is called in the walk of tests/integration/api/test_operations.py, which compares its answer with its schema and its audit record with
its row.
"""

from lmaas.api.operation import Operation, Permission
from lmaas.api.shapes import adapters, batches, files, models, responses, sessions, tenants, usage, webhooks
from lmaas.api.shapes.common import DryRun, Page, Paging
from lmaas.audit import Action

_OPERATOR, _ADMIN, _ANY = Permission.OPERATOR, Permission.TENANT_ADMIN, Permission.TENANT
_ADAPTER_FILES = ("adapter_config", "adapter_model")
_DRY_RUN = {200: "A dry run: what would have been created."}

# A tenant's own resources, and for operators those of any tenant.
LIST_ADAPTERS = Operation(
    "list_adapters", "GET", "/v1/adapters", _ANY, "List the adapters, by name.", Page[adapters.Adapter], query=adapters.AdapterQuery
)
UPLOAD_ADAPTER = Operation(
    "upload_adapter",
    "POST",
    "/v1/adapters",
    _ADMIN,
    "Upload an adapter, which becomes a new version unless a version has the same content.",
    adapters.UploadedAdapter,
    body=adapters.AdapterUpload,
    files=_ADAPTER_FILES,
    status=201,
    also={200: "A version has this content already: this one."},
    audit=Action.ADAPTER_UPLOAD,
)
GET_ADAPTER = Operation("get_adapter", "GET", "/v1/adapters/{name}", _ANY, "Show an adapter.", adapters.Adapter)
DELETE_ADAPTER = Operation(
    "delete_adapter",
    "DELETE",
    "/v1/adapters/{name}",
    _ADMIN,
    "Delete an adapter with all its versions and files.",
    adapters.DeletedAdapter,
    audit=Action.ADAPTER_DELETE,
)
LIST_VERSIONS = Operation(
    "list_versions",
    "GET",
    "/v1/adapters/{name}/versions",
    _ANY,
    "List the versions of an adapter, oldest first.",
    Page[adapters.AdapterVersion],
    query=Paging,
)
ACTIVATE_VERSION = Operation(
    "activate_version",
    "POST",
    "/v1/adapters/{name}/activate",
    _ADMIN,
    "Make a version the live one.",
    adapters.Adapter,
    body=adapters.Activation,
    audit=Action.ADAPTER_ACTIVATE,
)
LIST_KEYS = Operation(
    "list_keys", "GET", "/v1/keys", _ADMIN, "List the tenant's keys, newest first, without their secrets.", Page[tenants.Key], query=Paging
)
CREATE_KEY = Operation(
    "create_key",
    "POST",
    "/v1/keys",
    _ADMIN,
    "Create a key of the tenant. Its secret is in this response and nowhere else.",
    tenants.CreatedKey,
    body=tenants.NewKey,
    status=201,
    audit=Action.KEY_CREATE,
)
CHANGE_KEY = Operation(
    "change_key",
    "PATCH",
    "/v1/keys/{key}",
    _ADMIN,
    "Change the limits of a key.",
    tenants.Key,
    body=tenants.KeyChange,
    audit=Action.KEY_CHANGE,
)
REVOKE_KEY = Operation(
    "revoke_key",
    "DELETE",
    "/v1/keys/{key}",
    _ADMIN,
    "Revoke a key. It stops working within a second.",
    tenants.Key,
    audit=Action.KEY_REVOKE,
)
GET_OWN_TENANT = Operation(
    "get_own_tenant", "GET", "/v1/tenant", _ANY, "Show the tenant of this key, with its limits.", tenants.Tenant, for_operators=False
)
CREATE_SESSION = Operation(
    "create_session",
    "POST",
    "/v1/sessions",
    _ANY,
    "Create a session: a short-lived key with the rights of this key. Its secret is in this response and nowhere else.",
    sessions.CreatedSession,
    body=sessions.NewSession,
    status=201,
    audit=Action.SESSION_CREATE,
    for_operators=False,
)
SHOW_SESSION = Operation(
    "show_session", "GET", "/v1/sessions/current", _ANY, "Show the session of this key.", sessions.Session, for_operators=False
)
END_SESSION = Operation(
    "end_session",
    "DELETE",
    "/v1/sessions/current",
    _ANY,
    "End the session of this key.",
    sessions.EndedSession,
    audit=Action.SESSION_END,
    for_operators=False,
)
REPORT_USAGE = Operation(
    "report_usage",
    "GET",
    "/v1/usage",
    _ANY,
    "Report requests, tokens and charges by day, model, adapter and class of work, or by other fields. A key for inference sees its own.",
    Page[usage.Usage],
    query=usage.UsageQuery,
    csv=True,
    for_operators=False,
)
LIST_EVENTS = Operation(
    "list_events",
    "GET",
    "/v1/usage/events",
    _ANY,
    "List the events of the ledger, one for each request, newest first. A key for inference sees its own.",
    Page[usage.UsageEvent],
    query=usage.EventQuery,
    csv=True,
    for_operators=False,
)

# Stored responses and conversations of a tenant's requests, in OpenAI's shapes. Operators do not see them.
GET_RESPONSE = Operation(
    "get_response",
    "GET",
    "/v1/responses/{response}",
    _ANY,
    "Retrieve a response, or stream the events of one in the background.",
    responses.Response,
    query=responses.ResponseQuery,
    for_operators=False,
    events="With `stream`: the events of the response as in its creation, those after `starting_after` only.",
)
DELETE_RESPONSE = Operation(
    "delete_response",
    "DELETE",
    "/v1/responses/{response}",
    _ANY,
    "Delete a response with its input, at once. One that runs in the background ends.",
    responses.DeletedResponse,
    for_operators=False,
)
CANCEL_RESPONSE = Operation(
    "cancel_response",
    "POST",
    "/v1/responses/{response}/cancel",
    _ANY,
    "Cancel a response in the background. One that has ended stays as it is.",
    responses.Response,
    for_operators=False,
)
LIST_INPUT_ITEMS = Operation(
    "list_input_items",
    "GET",
    "/v1/responses/{response}/input_items",
    _ANY,
    "List the items of a response's own input, newest first.",
    Page[responses.ResponseItem],
    query=responses.ItemPaging,
    for_operators=False,
)
CREATE_CONVERSATION = Operation(
    "create_conversation",
    "POST",
    "/v1/conversations",
    _ANY,
    "Create a conversation.",
    responses.Conversation,
    body=responses.NewConversation,
    texts=("items",),
    for_operators=False,
)
GET_CONVERSATION = Operation(
    "get_conversation",
    "GET",
    "/v1/conversations/{conversation}",
    _ANY,
    "Retrieve a conversation.",
    responses.Conversation,
    for_operators=False,
)
CHANGE_CONVERSATION = Operation(
    "change_conversation",
    "POST",
    "/v1/conversations/{conversation}",
    _ANY,
    "Replace the metadata of a conversation.",
    responses.Conversation,
    body=responses.ConversationChange,
    for_operators=False,
)
DELETE_CONVERSATION = Operation(
    "delete_conversation",
    "DELETE",
    "/v1/conversations/{conversation}",
    _ANY,
    "Delete a conversation with its items, at once. Responses in it stay.",
    responses.DeletedConversation,
    for_operators=False,
)
ADD_ITEMS = Operation(
    "add_items",
    "POST",
    "/v1/conversations/{conversation}/items",
    _ANY,
    "Append items to a conversation.",
    Page[responses.ResponseItem],
    body=responses.NewItems,
    texts=("items",),
    for_operators=False,
)
LIST_ITEMS = Operation(
    "list_items",
    "GET",
    "/v1/conversations/{conversation}/items",
    _ANY,
    "List the items of a conversation, newest first.",
    Page[responses.ResponseItem],
    query=responses.ItemPaging,
    for_operators=False,
)
GET_ITEM = Operation(
    "get_item",
    "GET",
    "/v1/conversations/{conversation}/items/{item}",
    _ANY,
    "Retrieve an item of a conversation.",
    responses.ResponseItem,
    for_operators=False,
)
DELETE_ITEM = Operation(
    "delete_item",
    "DELETE",
    "/v1/conversations/{conversation}/items/{item}",
    _ANY,
    "Delete an item of a conversation, at once.",
    responses.Conversation,
    for_operators=False,
)

CREATE_FILE = Operation(
    "create_file",
    "POST",
    "/v1/files",
    _ANY,
    "Upload a file.",
    files.File,
    body=files.FileUpload,
    files=("file",),
    audit=Action.FILE_CREATE,
    for_operators=False,
)
LIST_FILES = Operation(
    "list_files", "GET", "/v1/files", _ANY, "List the files.", Page[files.File], query=files.FileQuery, for_operators=False
)
GET_FILE = Operation("get_file", "GET", "/v1/files/{file}", _ANY, "Retrieve what is known of a file.", files.File, for_operators=False)
GET_FILE_CONTENT = Operation(
    "get_file_content",
    "GET",
    "/v1/files/{file}/content",
    _ANY,
    "Download a file.",
    None,
    media="application/octet-stream",
    for_operators=False,
)
DELETE_FILE = Operation(
    "delete_file",
    "DELETE",
    "/v1/files/{file}",
    _ANY,
    "Delete a file, at once.",
    files.DeletedFile,
    audit=Action.FILE_DELETE,
    for_operators=False,
)

# Batches, in OpenAI's shapes and in Anthropic's. Operators see and cancel those of OpenAI's.
CREATE_BATCH = Operation(
    "create_batch",
    "POST",
    "/v1/batches",
    _ANY,
    "Create a batch: a file of requests that run at a lower price when engines have room.",
    batches.Batch,
    body=batches.NewBatch,
    audit=Action.BATCH_CREATE,
    for_operators=False,
)
LIST_BATCHES = Operation(
    "list_batches",
    "GET",
    "/v1/batches",
    _ANY,
    "List the batches, newest first.",
    Page[batches.Batch],
    query=batches.BatchPaging,
)
GET_BATCH = Operation("get_batch", "GET", "/v1/batches/{batch}", _ANY, "Show a batch.", batches.Batch)
CANCEL_BATCH = Operation(
    "cancel_batch",
    "POST",
    "/v1/batches/{batch}/cancel",
    _ANY,
    "Cancel a batch. Requests that have ended are kept.",
    batches.Batch,
    audit=Action.BATCH_CANCEL,
)
CREATE_MESSAGE_BATCH = Operation(
    "create_message_batch",
    "POST",
    "/v1/messages/batches",
    _ANY,
    "Create a message batch.",
    batches.MessageBatch,
    body=batches.NewMessageBatch,
    reads_body=True,
    audit=Action.BATCH_CREATE,
    for_operators=False,
)
LIST_MESSAGE_BATCHES = Operation(
    "list_message_batches",
    "GET",
    "/v1/messages/batches",
    _ANY,
    "List the message batches, newest first.",
    batches.MessageBatches,
    query=batches.MessageBatchPaging,
    for_operators=False,
)
GET_MESSAGE_BATCH = Operation(
    "get_message_batch",
    "GET",
    "/v1/messages/batches/{batch}",
    _ANY,
    "Show a message batch.",
    batches.MessageBatch,
    for_operators=False,
)
CANCEL_MESSAGE_BATCH = Operation(
    "cancel_message_batch",
    "POST",
    "/v1/messages/batches/{batch}/cancel",
    _ANY,
    "Cancel a message batch. Requests that have ended are kept.",
    batches.MessageBatch,
    audit=Action.BATCH_CANCEL,
    for_operators=False,
)
DELETE_MESSAGE_BATCH = Operation(
    "delete_message_batch",
    "DELETE",
    "/v1/messages/batches/{batch}",
    _ANY,
    "Delete a message batch that has ended, with its requests and results.",
    batches.DeletedMessageBatch,
    audit=Action.BATCH_DELETE,
    for_operators=False,
)
MESSAGE_BATCH_RESULTS = Operation(
    "message_batch_results",
    "GET",
    "/v1/messages/batches/{batch}/results",
    _ANY,
    "Stream the results of a message batch that has ended: JSON Lines, one for each request.",
    batches.MessageResult,
    media="application/x-jsonl",
    for_operators=False,
)

# The targets of a tenant's events.
LIST_WEBHOOKS = Operation(
    "list_webhooks",
    "GET",
    "/v1/webhooks",
    _ADMIN,
    "List the webhooks, oldest first, without their secrets.",
    Page[webhooks.Webhook],
    query=Paging,
)
CREATE_WEBHOOK = Operation(
    "create_webhook",
    "POST",
    "/v1/webhooks",
    _ADMIN,
    "Create a webhook. Its secret is in this response and nowhere else.",
    webhooks.WebhookWithSecret,
    body=webhooks.NewWebhook,
    status=201,
    audit=Action.WEBHOOK_CREATE,
)
GET_WEBHOOK = Operation(
    "get_webhook",
    "GET",
    "/v1/webhooks/{webhook}",
    _ADMIN,
    "Show a webhook.",
    webhooks.Webhook,
)
CHANGE_WEBHOOK = Operation(
    "change_webhook",
    "PATCH",
    "/v1/webhooks/{webhook}",
    _ADMIN,
    "Change a webhook, or switch it on or off.",
    webhooks.Webhook,
    body=webhooks.WebhookChange,
    audit=Action.WEBHOOK_CHANGE,
)
DELETE_WEBHOOK = Operation(
    "delete_webhook",
    "DELETE",
    "/v1/webhooks/{webhook}",
    _ADMIN,
    "Delete a webhook with its deliveries.",
    webhooks.DeletedWebhook,
    audit=Action.WEBHOOK_DELETE,
)
ROTATE_WEBHOOK_SECRET = Operation(
    "rotate_webhook_secret",
    "POST",
    "/v1/webhooks/{webhook}/rotate_secret",
    _ADMIN,
    "Replace the secret of a webhook. The new one is in this response and nowhere else.",
    webhooks.WebhookWithSecret,
    body=webhooks.SecretRotation,
    audit=Action.WEBHOOK_ROTATE,
)
TEST_WEBHOOK = Operation(
    "test_webhook",
    "POST",
    "/v1/webhooks/{webhook}/test",
    _ADMIN,
    "Send a test event to a webhook.",
    webhooks.Delivery,
    audit=Action.WEBHOOK_TEST,
)
LIST_DELIVERIES = Operation(
    "list_deliveries",
    "GET",
    "/v1/webhooks/{webhook}/deliveries",
    _ADMIN,
    "List the deliveries of events to a webhook, newest first.",
    Page[webhooks.Delivery],
    query=webhooks.DeliveryQuery,
)
GET_DELIVERY = Operation(
    "get_delivery",
    "GET",
    "/v1/webhooks/{webhook}/deliveries/{event}",
    _ADMIN,
    "Show the delivery of an event to a webhook.",
    webhooks.Delivery,
)
REDELIVER = Operation(
    "redeliver",
    "POST",
    "/v1/webhooks/{webhook}/deliveries/{event}/redeliver",
    _ADMIN,
    "Send an event to a webhook again, under the same id.",
    webhooks.Delivery,
    audit=Action.WEBHOOK_REDELIVER,
)

# For operators.
LIST_TENANTS = Operation(
    "list_tenants", "GET", "/admin/v1/tenants", _OPERATOR, "List the tenants, by name.", Page[tenants.Tenant], query=Paging
)
CREATE_TENANT = Operation(
    "create_tenant",
    "POST",
    "/admin/v1/tenants",
    _OPERATOR,
    "Create a tenant, without keys yet.",
    tenants.Tenant,
    body=tenants.NewTenant,
    query=DryRun,
    status=201,
    also=_DRY_RUN,
    audit=Action.TENANT_CREATE,
)
GET_TENANT = Operation("get_tenant", "GET", "/admin/v1/tenants/{tenant}", _OPERATOR, "Show a tenant, by id or name.", tenants.Tenant)
CHANGE_TENANT = Operation(
    "change_tenant",
    "PATCH",
    "/admin/v1/tenants/{tenant}",
    _OPERATOR,
    "Change the tier or limits of a tenant. Null puts a default back.",
    tenants.Tenant,
    body=tenants.TenantChange,
    query=DryRun,
    audit=Action.TENANT_CHANGE,
)
DELETE_TENANT = Operation(
    "delete_tenant",
    "DELETE",
    "/admin/v1/tenants/{tenant}",
    _OPERATOR,
    "Delete a tenant: keys stop at once, adapters and their files go, usage stays for the bill.",
    tenants.DeletedTenant,
    audit=Action.TENANT_DELETE,
)
LIST_OPERATOR_KEYS = Operation(
    "list_operator_keys",
    "GET",
    "/admin/v1/keys",
    _OPERATOR,
    "List the operators' keys, newest first, without their secrets.",
    Page[tenants.Key],
    query=Paging,
)
CREATE_OPERATOR_KEY = Operation(
    "create_operator_key",
    "POST",
    "/admin/v1/keys",
    _OPERATOR,
    "Create a key of an operator. Its secret is in this response and nowhere else.",
    tenants.CreatedKey,
    body=tenants.NewOperatorKey,
    status=201,
    audit=Action.KEY_CREATE,
)
REVOKE_OPERATOR_KEY = Operation(
    "revoke_operator_key",
    "DELETE",
    "/admin/v1/keys/{key}",
    _OPERATOR,
    "Revoke a key of an operator. The last one is refused with 409 last_operator_key, unless force is true.",
    tenants.Key,
    query=tenants.Revocation,
    audit=Action.KEY_REVOKE,
)
CREATE_OPERATOR_SESSION = Operation(
    "create_operator_session",
    "POST",
    "/admin/v1/sessions",
    _OPERATOR,
    "Create a session of an operator, or of a tenant for a person who has signed in. Its secret is in this response and nowhere else.",
    sessions.CreatedSession,
    body=sessions.NewOperatorSession,
    status=201,
    audit=Action.SESSION_CREATE,
)
SHOW_OPERATOR_SESSION = Operation(
    "show_operator_session", "GET", "/admin/v1/sessions/current", _OPERATOR, "Show the session of this key.", sessions.Session
)
END_OPERATOR_SESSION = Operation(
    "end_operator_session",
    "DELETE",
    "/admin/v1/sessions/current",
    _OPERATOR,
    "End the session of this key.",
    sessions.EndedSession,
    audit=Action.SESSION_END,
)
LIST_MODELS = Operation(
    "list_base_models", "GET", "/admin/v1/base-models", _OPERATOR, "List the base models, by name.", Page[models.BaseModel], query=Paging
)
CREATE_MODEL = Operation(
    "create_base_model",
    "POST",
    "/admin/v1/base-models",
    _OPERATOR,
    "Create a base model with an empty pool. Its shapes are read from the headers of its weights.",
    models.BaseModel,
    body=models.NewBaseModel,
    query=DryRun,
    status=201,
    also=_DRY_RUN,
    audit=Action.BASE_MODEL_CREATE,
)
GET_MODEL = Operation(
    "get_base_model",
    "GET",
    "/admin/v1/base-models/{model}",
    _OPERATOR,
    "Show a base model, by id or name: what its pool does, and why.",
    models.BaseModel,
)
CHANGE_MODEL = Operation(
    "change_base_model",
    "PATCH",
    "/admin/v1/base-models/{model}",
    _OPERATOR,
    "Change values of a base model. Null puts a default back. Values of engines hold for replicas that start from now on; source, dtype "
    "and max_lora_rank change only while there are neither adapters nor replicas.",
    models.BaseModel,
    body=models.BaseModelChange,
    query=DryRun,
    audit=Action.BASE_MODEL_CHANGE,
)
DELETE_MODEL = Operation(
    "delete_base_model",
    "DELETE",
    "/admin/v1/base-models/{model}",
    _OPERATOR,
    "Delete a base model that has neither adapters nor replicas. What it has cost stays for the bill.",
    models.DeletedBaseModel,
    audit=Action.BASE_MODEL_DELETE,
)
CHECK_ADAPTER = Operation(
    "check_adapter",
    "POST",
    "/admin/v1/check-adapter",
    _OPERATOR,
    "Check an adapter's files as an upload does, and store nothing.",
    adapters.CheckedAdapter,
    body=adapters.AdapterCheck,
    files=_ADAPTER_FILES,
)
LIST_REPLICAS = Operation(
    "list_replicas",
    "GET",
    "/admin/v1/replicas",
    _OPERATOR,
    "List the replicas, newest first.",
    Page[models.Replica],
    query=models.ReplicaQuery,
)
GET_REPLICA = Operation(
    "get_replica", "GET", "/admin/v1/replicas/{replica}", _OPERATOR, "Show a replica, also one that has ended.", models.Replica
)
STOP_REPLICA = Operation(
    "stop_replica",
    "DELETE",
    "/admin/v1/replicas/{replica}",
    _OPERATOR,
    "Drain a replica and stop it. If there is demand, the controller starts another.",
    models.StoppingReplica,
    audit=Action.REPLICA_STOP,
)
REPORT_ALL_USAGE = Operation(
    "report_all_usage",
    "GET",
    "/admin/v1/usage",
    _OPERATOR,
    "Report requests, tokens and charges by day, tenant, model, adapter and class of work, or by other fields, and the tokens that were "
    "wasted.",
    Page[usage.OperatorUsage],
    query=usage.OperatorUsageQuery,
    csv=True,
)
LIST_ALL_EVENTS = Operation(
    "list_all_events",
    "GET",
    "/admin/v1/usage/events",
    _OPERATOR,
    "List the events of the ledger, one for each request, newest first.",
    Page[usage.OperatorUsageEvent],
    query=usage.OperatorEventQuery,
    csv=True,
)
CHECK_USAGE = Operation(
    "check_usage",
    "GET",
    "/admin/v1/usage/check",
    _OPERATOR,
    "Compare the daily sums from which reports are made with the ledger.",
    usage.UsageCheck,
    query=usage.CheckQuery,
)
REPORT_COGS = Operation(
    "report_cogs",
    "GET",
    "/admin/v1/cogs",
    _OPERATOR,
    "Report engine time, its cost, the charge and the margin, by day, tenant and adapter, or by other fields.",
    usage.Cogs,
    query=usage.CogsQuery,
    csv=True,
)

OPERATIONS = tuple(value for value in tuple(globals().values()) if isinstance(value, Operation))
PLACES = tuple(place for operation in OPERATIONS for place in operation.places)
