"""The check of a request's grammar, before the request is accepted.

Nothing is sent to the client meanwhile, so that a refusal has its own HTTP status, also for a stream.
"""

import asyncio
from enum import StrEnum

from lmaas.engine.grammars.verdict import Verdict
from lmaas.errors import InvalidRequest
from lmaas.inference.grammars import Grammars, Lookup, NoCheckerError, source_of, unavailable
from lmaas.protocols.parameters.request import EngineRequest
from lmaas.store.models import BaseModel
from lmaas.types import Principal
from lmaas.web.call import Call

#: How long a request waits for its check at most. Proxies close connections that are silent for a minute.
WAIT_S = 50.0


class Check(StrEnum):
    """The result of a check. NO_HOST means that there is no host that can check."""

    PASSED = "passed"
    NO_HOST = "no_host"
    CLIENT_GONE = "client_gone"


async def check_grammar(
    grammars: Grammars, call: Call, principal: Principal, model: BaseModel, path: str, request: EngineRequest, deadline_s: float
) -> Check:
    """Check that an engine may compile the request's grammar. The verdict on a new grammar is awaited for at most `deadline_s`.

    Tools that the gateway made strict, and that cannot be enforced, are passed on as the client sent them. Raises InvalidRequest with the
    checker's reason, OverLimit, and Unavailable.
    """
    while True:
        lookup = grammars.look_up(principal.tenant_id or "", model, path, request.grammar)
        verdict = lookup.verdict
        if verdict is None:
            try:
                verdict = await _verdict(grammars, call, principal, lookup, deadline_s)
            except NoCheckerError:
                return Check.NO_HOST
            if verdict is None:
                return Check.CLIENT_GONE
        if not verdict.code:
            return Check.PASSED
        if verdict.param not in ("", "tools") or not request.loosen():
            raise _refusal(verdict, request)


async def _verdict(grammars: Grammars, call: Call, principal: Principal, lookup: Lookup, deadline_s: float) -> Verdict | None:
    """Return the verdict on a new grammar, or None if the client has disconnected."""
    checking = asyncio.create_task(grammars.check(principal.tenant_id or "", lookup, principal.max_queued), name="grammar-check")

    def leave() -> None:
        checking.cancel()

    undo = call.on_gone(leave)
    try:
        await asyncio.wait({checking}, timeout=min(deadline_s, WAIT_S))
        if not checking.done():
            raise unavailable()
        return None if checking.cancelled() else checking.result()
    finally:
        undo()
        checking.cancel()


def _refusal(verdict: Verdict, request: EngineRequest) -> InvalidRequest:
    param, message = verdict.param or source_of(request.grammar), verdict.message
    if param == "tools" and request.legacy_functions:
        param, message = "functions", message.replace("The tools'", "The functions'")
    return InvalidRequest(message, code=verdict.code, param=param)
