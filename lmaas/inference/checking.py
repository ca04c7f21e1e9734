"""The check of a request's grammar, before the request is accepted.

Nothing is sent to the client meanwhile, so that a refusal has its own HTTP status, also for a stream.
"""

import asyncio

from lmaas.engine.grammars.verdict import Verdict
from lmaas.errors import InvalidRequest
from lmaas.inference.grammars import Grammars, Lookup, unavailable
from lmaas.inference.protocol import AnyInference
from lmaas.inference.request import EngineRequest
from lmaas.inference.sink import ReceiverGone, Sink
from lmaas.types import Principal

#: The maximum time for which a request waits for its check. Proxies close connections that are silent for a minute.
WAIT_S = 50.0


async def check_grammar(grammars: Grammars, principal: Principal, inference: AnyInference, sink: Sink, deadline_s: float) -> None:
    """Check that an engine may compile the request's grammar. The verdict on a new grammar is awaited for at most `deadline_s`.

    Tools that the gateway made strict, and that cannot be enforced, are passed on as the client sent them. Raises InvalidRequest with the
    checker's reason, OverLimit, Unavailable, NoCheckerError if there is no host that can check, and ReceiverGone.
    """
    request, path = inference.request, inference.protocol.engine_path
    while True:
        lookup = grammars.look_up(inference.tenant_id, inference.model.base, path, request.grammar, request.grammar_field)
        verdict = lookup.verdict or await _verdict(grammars, principal, lookup, sink, deadline_s)
        if not verdict.code:
            return
        if verdict.param not in ("", "tools") or not request.loosen():
            raise _refusal(verdict, request)


async def _verdict(grammars: Grammars, principal: Principal, lookup: Lookup, sink: Sink, deadline_s: float) -> Verdict:
    """Return the verdict on a new grammar. Raises ReceiverGone if the client has disconnected."""
    checking = asyncio.create_task(grammars.check(principal.tenant_id or "", lookup, principal.max_queued), name="grammar-check")

    def leave() -> None:
        checking.cancel()

    undo = sink.on_gone(leave)
    try:
        await asyncio.wait({checking}, timeout=min(deadline_s, WAIT_S))
        if not checking.done():
            raise unavailable()
        if checking.cancelled():
            raise ReceiverGone
        return checking.result()
    finally:
        undo()
        checking.cancel()


def _refusal(verdict: Verdict, request: EngineRequest) -> InvalidRequest:
    """Return the error for a grammar that the checker refuses, in terms of the client's own fields."""
    param, message = verdict.param, verdict.message
    field = (request.clients_name(param) or param) if param else request.grammar_field
    if param:
        message = message.replace(f"'{param}'", f"'{field}'").replace("The tools'", f"The {field}'")
    return InvalidRequest(message, code=verdict.code, param=field)
