"""Work on whole batches by runners: validating input files, and writing result files."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.admission.tiers import batch_limits
from lmaas.batches import outputs
from lmaas.batches.dialects import FORMS
from lmaas.batches.validation import Fault, FoundLine, Validator
from lmaas.errors import LmaasError, NotFound
from lmaas.files.drafts import Draft
from lmaas.files.service import Files, Purpose, Written
from lmaas.http import new_request_id
from lmaas.inference.catalog import Catalog
from lmaas.inference.protocol import AnyProtocol
from lmaas.protocols.parameters.reading import read_model
from lmaas.states import BatchStatus, Dialect, LineState, PoolKind
from lmaas.store.batch_lines import LineRow, NewLine, add_lines, delete_lines, results
from lmaas.store.batches import Batch, leased_batch, move_leased, refusal_of_lines
from lmaas.store.database import Database
from lmaas.store.files import File
from lmaas.store.runners import BatchLease

#: The bytes of an input file that are checked before other tasks run. They take about a millisecond.
_PIECE_BYTES = 128 * 1024
#: The bytes of a result file are limited by those of the answers in the database, and not here.
_MAX_RESULTS_BYTES = 1 << 50
#: The result files by the batch's column for their ids, and the ends of their names.
_NAMES = {"output_file_id": "output", "error_file_id": "error"}
_MESSAGES_NAMES = {"output_file_id": "results"}


class _Place(NamedTuple):
    """The place where the lines for a model run: the pool, the engine's name of the model, and its context. A model that cannot serve them
    has an error instead: the status and the body of the response."""

    pool_id: str | None
    engine_name: str
    max_model_len: int
    status_code: int | None = None
    answer: bytes | None = None


@dataclass(frozen=True, slots=True)
class BatchWork:
    """Validates and finalizes batches that a runner has leased.

    Each method can be repeated until it has succeeded, also after its process was killed. It raises LeaseLost, without having written
    anything, if the lease is no longer valid. `protocols` are by the paths of their requests.
    """

    db: Database
    files: Files
    catalog: Catalog
    protocols: Mapping[str, AnyProtocol]
    max_request_bytes: int

    async def validate(self, lease: BatchLease) -> None:
        """Check the input file of a batch and store its lines in the order in which they are to run, or let the batch fail."""
        batch = await leased_batch(self.db, lease, BatchStatus.VALIDATING)
        checked = await self._checked(batch)
        if isinstance(checked, Fault):
            await self._fail(lease, [checked])
        elif checked.faults:
            await self._fail(lease, checked.faults)
        else:
            await self._start(lease, batch, await self._ordered(batch, checked.lines))

    async def fail(self, lease: BatchLease, code: str, message: str) -> None:
        """Let a batch that is to be validated fail with this error."""
        await self._fail(lease, [Fault(code, message)])

    async def finalize(self, lease: BatchLease) -> None:
        """Write the result files of a batch whose lines have ended, delete its lines, and end it."""
        batch = await leased_batch(self.db, lease, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
        async with AsyncExitStack() as stack:
            names = _NAMES if batch.dialect == Dialect.OPENAI else _MESSAGES_NAMES
            drafts = {name: await stack.enter_async_context(self.files.draft(_MAX_RESULTS_BYTES)) for name in names}
            async for rows in self._rows(lease, batch):
                for row in rows:
                    name, line = _result(batch, row)
                    await drafts[name].write(line)
                await asyncio.sleep(0)
            await self._end(lease, batch, {name: draft for name, draft in drafts.items() if draft.size_bytes})

    async def _rows(self, lease: BatchLease, batch: Batch) -> AsyncIterator[Sequence[LineRow]]:
        """Provide the lines of a batch. Of one that was cancelled before they were stored, they are those of its input file."""
        if batch.in_progress_at is None and batch.total and batch.status == BatchStatus.CANCELLING:
            checked = await self._checked(batch)
            lines = [] if isinstance(checked, Fault) else checked.lines
            yield [LineRow(0, line.number, line.custom_id, LineState.PENDING, None, None, None) for line in lines]
            return
        async for rows in results(self.db, lease):
            yield rows

    async def _checked(self, batch: Batch) -> Validator | Fault:
        """Return the validator after the whole input file, or what is wrong with the file as a whole."""
        form = FORMS[Dialect(batch.dialect)]
        gone = Fault("input_file_not_found", "The input file was deleted, or has expired.", param="input_file_id")
        protocol = self.protocols[batch.endpoint]
        generates = protocol.kind is PoolKind.GENERATE
        validator = Validator(batch.endpoint, self.max_request_bytes, generates=generates, max_lines=form.lines)
        if batch.input_file_id is None:
            return gone
        try:
            file = await self.files.get(batch.tenant_id, batch.input_file_id)
            if file.size_bytes > form.file_bytes:
                message = (
                    f"The input file has {file.size_bytes:,} bytes, the maximum is {form.file_bytes:,}. Divide it into several batches."
                )
                return Fault("file_too_large", message, param="input_file_id")
            async for piece in _pieces(self.files.stream(file)):
                validator.feed(piece)
                if validator.is_full:
                    break
        except NotFound:
            return gone
        validator.close()
        return validator

    async def _ordered(self, batch: Batch, lines: Sequence[FoundLine]) -> list[NewLine]:
        """Return the lines in the order in which they are to run: by model, then by the beginning of the prompt."""
        places = {model: await self._place(batch, model) for model in {line.model for line in lines}}
        # In a thread, so that others are served meanwhile.
        return await asyncio.to_thread(_in_order, lines, places)

    async def _place(self, batch: Batch, model: str) -> _Place:
        protocol = self.protocols[batch.endpoint]
        try:
            served = await self.catalog.resolve(batch.tenant_id, read_model({"model": model}))
            served.check_kind(protocol.kind, model, protocol.path)
        except LmaasError as error:
            if error.retryable:
                raise
            body = protocol.error_body(error, new_request_id())
            return _Place(None, "", 0, protocol.error_status(error), msgspec.json.encode(body))
        return _Place(served.base.id, served.engine_name, served.base.max_model_len)

    async def _start(self, lease: BatchLease, batch: Batch, lines: Sequence[NewLine]) -> None:
        failed = sum(line.answer is not None for line in lines)
        # Without a line to run, there is nothing to wait for.
        target = BatchStatus.IN_PROGRESS if failed < len(lines) else BatchStatus.FINALIZING
        async with self.db.begin(lease.tenant_id) as connection:
            refusal = None
            if not batch.total:
                # Otherwise the number of lines was known, and allowed, when the batch was created.
                refusal = await refusal_of_lines(connection, lease.tenant_id, len(lines) - failed, batch_limits)
            if refusal is None:
                await move_leased(connection, lease, target, total=len(lines), failed=failed)
                await add_lines(connection, lease.tenant_id, batch.id, lines)
        if refusal is not None:
            await self._fail(lease, [Fault("batch_limit_exceeded", refusal)])

    async def _fail(self, lease: BatchLease, faults: Sequence[Fault]) -> None:
        async with self.db.begin(lease.tenant_id) as connection:
            await move_leased(connection, lease, BatchStatus.FAILED, errors=msgspec.json.encode(faults))

    async def _end(self, lease: BatchLease, batch: Batch, drafts: Mapping[str, Draft]) -> None:
        """Add the files, delete the lines and end the batch, all in one transaction."""

        async def end(connection: AsyncConnection, files: Sequence[File]) -> None:
            ids = {name: file.id for name, file in zip(drafts, files, strict=bool(files))}
            await move_leased(connection, lease, _end_of(batch), **ids)
            await delete_lines(connection, lease.tenant_id, batch.id)

        names = _NAMES if batch.dialect == Dialect.OPENAI else _MESSAGES_NAMES
        written = [
            Written(Purpose.BATCH_OUTPUT, f"{batch.id}_{names[name]}.jsonl", draft, batch.output_expires_after_s)
            for name, draft in drafts.items()
        ]
        if written:
            # Of a tenant that was deleted while its batch went on, nothing is kept.
            with contextlib.suppress(NotFound):
                await self.files.add_written(lease.tenant_id, written, end)
                return
        async with self.db.begin(lease.tenant_id) as connection:
            await end(connection, [])


def _in_order(lines: Sequence[FoundLine], places: Mapping[str, _Place]) -> list[NewLine]:
    def key(line: FoundLine) -> tuple[str, str, bytes, int]:
        place = places[line.model]
        return place.pool_id or "", place.engine_name, line.prefix, line.number

    return [
        NewLine(
            line=line.number,
            byte_offset=line.offset,
            byte_length=line.size,
            custom_id=line.custom_id,
            pool_id=(place := places[line.model]).pool_id,
            tokens=line.tokens.within(place.max_model_len),
            status_code=place.status_code,
            answer=place.answer,
        )
        for line in sorted(lines, key=key)
    ]


def _result(batch: Batch, row: LineRow) -> tuple[str, bytes]:
    """Return the result file that a line belongs to, and what it has there."""
    if batch.dialect == Dialect.ANTHROPIC:
        return "output_file_id", outputs.anthropic_line(row, _stop(batch))
    name = "output_file_id" if row.state == LineState.DONE else "error_file_id"
    return name, outputs.openai_line(batch.id, row, _stop(batch))


def _stop(batch: Batch) -> outputs.Stop:
    """Return why the lines of a batch that are still pending were not run."""
    if batch.status == BatchStatus.CANCELLING:
        return outputs.CANCELLED
    if batch.stop_code is None:
        return outputs.LEFT
    if batch.stop_code == outputs.EXPIRED.code:
        return outputs.EXPIRED
    return outputs.Stop(batch.stop_code, batch.stop_message or outputs.LEFT.message)


def _end_of(batch: Batch) -> BatchStatus:
    if batch.status == BatchStatus.CANCELLING:
        return BatchStatus.CANCELLED
    return BatchStatus.EXPIRED if batch.expired else BatchStatus.COMPLETED


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Provide chunks in pieces, between which other tasks run."""
    async for chunk in chunks:
        for start in range(0, len(chunk), _PIECE_BYTES):
            yield chunk[start : start + _PIECE_BYTES]
            await asyncio.sleep(0)
