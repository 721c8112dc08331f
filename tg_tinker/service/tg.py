"""What a ``ServiceClient`` offers of the TG surface: runs, futures, artifacts, the audit log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from tg_tinker.core.call import Call, Flow, call
from tg_tinker.core.reply import Reply
from tg_tinker.core.retrieval import TGRetrieval
from tg_tinker.core.run import RunCore
from tg_tinker.errors import ResourceNotFoundError, TGTinkerError
from tg_tinker.faces import blocking, twin
from tg_tinker.futures import OperationFuture
from tg_tinker.service.base import ServiceBase
from tg_tinker.service.destination import check_destination, write
from tg_tinker.training import TrainingClient
from tg_tinker.types import arguments, checks
from tg_tinker.types.config import TrainingConfig
from tg_tinker.types.results import ArtifactInfo, AuditLogEntry, TrainingClientInfo
from tg_tinker.wire import codec, loops, tg
from tg_tinker.wire.json_object import json_object
from tg_tinker.wire.route import Route
from tg_tinker.wire.tg import FutureInfo

if TYPE_CHECKING:
    from pathlib import Path

    from tg_tinker.verify import AuditHead, AuditVerification

__all__ = ["TGService"]

STATUSES = ("active", "completed", "failed")
FUTURE_STATUSES = ("pending", "running", *tg.ENDED)
_PAGE = 1000  # audit entries in one answer, at most
_logger = logging.getLogger("tg_tinker.service")


class TGService(ServiceBase):
    """The TG half of ``ServiceClient``."""

    # ------------------------------------------------------------------------------------------------ runs

    @blocking
    def create_training_client(
        self, config: TrainingConfig | Mapping[str, Any], checkpoint_id: str | None = None
    ) -> Flow[TrainingClient]:
        """Create a run of the TG surface; blocks until its model is loaded, ``ready_timeout`` seconds at most.

        ``checkpoint_id`` is the artifact of a saved state to start from.

        Raises ``InvalidRequestError`` naming the field, ``ResourceNotFoundError`` for an unknown model or artifact.
        """
        checked = config if isinstance(config, TrainingConfig) else TrainingConfig.from_dict(config)
        if checkpoint_id is not None and not (isinstance(checkpoint_id, str) and checkpoint_id):
            raise checks.refuse("checkpoint_id", "the artifact_id of a saved state, or None", checkpoint_id)
        json_object("metadata", checked.metadata)
        body = {**checked.to_dict(), **({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}
        create = call(tg.CREATE, body, decode=self._view, timeout=self.config.ready_timeout)
        return Flow(operation="create_training_client", steps=partial(self._create, create, checked.model_ref))

    create_training_client_async = twin(create_training_client)

    async def _create(self, create: Call[TrainingClient], model: str) -> TrainingClient:
        self._report("load", f"a run on {model}: the server loads the model, and fetches it first where it has to")
        made = await self.core.perform(create)
        self._report("ready", f"run {made.id} on {model}")
        return made

    @blocking
    def get_training_client(self, training_client_id: str) -> Call[TrainingClient]:
        """Attach to a run of the TG surface that exists, as it is; nothing is reset.

        Raises ``ResourceNotFoundError`` where there is no such run.
        """
        parts = {"id": arguments.text("training_client_id", training_client_id)}
        return call(tg.GET, parts=parts, decode=self._view)

    get_training_client_async = twin(get_training_client)

    @blocking
    def list_training_clients(self, status: str | None = None, limit: int = 100) -> Call[list[TrainingClientInfo]]:
        """List the tenant's runs of the TG surface, newest first; ``status`` is "active", "completed" or "failed"."""
        if status is not None and status not in STATUSES:
            raise checks.refuse("status", f"one of {', '.join(STATUSES)}, or None", status)
        return call(tg.LIST, query={"status": status, "limit": arguments.whole("limit", limit, 1, _PAGE)})

    list_training_clients_async = twin(list_training_clients)

    @blocking
    def delete_training_client(self, training_client_id: str) -> Call[None]:
        """Delete a run: its adapter, gradients and queue; artifacts saved from it stay.

        Raises ``ResourceNotFoundError`` where there is no such run.
        """
        parts = {"id": arguments.text("training_client_id", training_client_id)}
        return call(tg.DELETE, parts=parts, decode=_nothing, whole_reply=True)

    delete_training_client_async = twin(delete_training_client)

    def _view(self, data: Any) -> TrainingClient:
        info = codec.decode(TrainingClientInfo, data)
        self._tenant.note(info.tenant_id)
        for doubt in (info.dp_metrics or {}).get("warnings", ()):
            _logger.warning("run %s: %s", info.training_client_id, doubt)
        core = RunCore(self.core.service, TGRetrieval(), name=f"run {info.training_client_id}")
        return TrainingClient(core, info, self._tokenizers)

    # --------------------------------------------------------------------------------------------- futures

    @blocking
    def get_future(self, future_id: str) -> Flow[OperationFuture[Any]]:
        """Find an operation again by its id, also after this program was restarted.

        Results are kept for an hour. What had not finished when its server ended fails with ``ServerRestartedError``.

        Raises ``ResourceNotFoundError`` where there is no such future.
        """
        return Flow(operation="get_future", steps=partial(self._find_future, arguments.text("future_id", future_id)))

    get_future_async = twin(get_future)

    @blocking
    def get_future_info(self, future_id: str) -> Call[FutureInfo]:
        """Tell how far an operation is, without its result: status and times.

        Raises ``ResourceNotFoundError`` where there is no such future.
        """
        return call(tg.FUTURE, parts={"id": arguments.text("future_id", future_id)})

    get_future_info_async = twin(get_future_info)

    @blocking
    def list_futures(
        self, training_client_id: str | None = None, status: str | None = None, limit: int = 100
    ) -> Call[list[FutureInfo]]:
        """List the tenant's operations, newest first, those of earlier server processes too.

        ``status`` is "pending", "running", "completed", "failed" or "cancelled".
        """
        if status is not None and status not in FUTURE_STATUSES:
            raise checks.refuse("status", f"one of {', '.join(FUTURE_STATUSES)}, or None", status)
        run = arguments.optional_text("training_client_id", training_client_id)
        limit = arguments.whole("limit", limit, 1, _PAGE)
        return call(tg.FUTURES, query={"training_client_id": run, "status": status, "limit": limit})

    list_futures_async = twin(list_futures)

    async def _find_future(self, future_id: str) -> OperationFuture[Any]:
        info = await self.core.perform(call(tg.FUTURE, parts={"id": future_id}))
        client = info.training_client_id or ""
        table = _LOOPS if client.startswith(LOOPS_RUN) else _TG
        route = table.get(info.operation)
        if route is None:
            message = f"future {future_id} is a {info.operation}, which this client does not know how to read"
            raise ResourceNotFoundError(message, resource_type="future", resource_id=future_id)
        future: OperationFuture[Any] = self.core.attach(future_id, call(route, parts={"id": client}))
        if info.status in tg.ENDED:  # then what the handle says of itself is to be true from the start
            with suppress(TGTinkerError):
                await future.result_async()
        return future

    # ------------------------------------------------------------------------------------------- artifacts

    @blocking
    def list_artifacts(self, training_client_id: str | None = None, limit: int = 100) -> Call[list[ArtifactInfo]]:
        """List the tenant's artifacts, or those of one run, newest first."""
        run = arguments.optional_text("training_client_id", training_client_id)
        return call(tg.ARTIFACTS, query={"training_client_id": run, "limit": arguments.whole("limit", limit, 1, _PAGE)})

    list_artifacts_async = twin(list_artifacts)

    @blocking
    def delete_artifact(self, artifact_id: str) -> Call[None]:
        """Remove an artifact for good.

        Raises ``ResourceNotFoundError`` where there is no such artifact.
        """
        parts = {"id": arguments.text("artifact_id", artifact_id)}
        return call(tg.ARTIFACT, parts=parts, decode=_nothing, whole_reply=True)

    delete_artifact_async = twin(delete_artifact)

    @blocking
    def pull_artifact(
        self,
        artifact_id: str,
        destination: str | Path | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Flow[bytes]:
        """Return an artifact's sealed bytes, and write them to the file ``destination`` where one is given.

        Only the holder of the tenant's key can open them (``open_artifact``, or ``tg-tinker artifacts open``).
        ``progress`` is called now and then with the number of bytes that have come, on the client's home.

        Raises ``ResourceNotFoundError`` where there is no such artifact.
        """
        get = call(
            tg.ARTIFACT_CONTENT,
            parts={"id": arguments.text("artifact_id", artifact_id)},
            decode=_body,
            whole_reply=True,
            timeout=self.config.timeout,
        )
        if destination is not None:
            check_destination(destination)
        return Flow(operation="pull_artifact", steps=partial(self._pull, get, destination, progress))

    pull_artifact_async = twin(pull_artifact)

    async def _pull(
        self, get: Call[bytes], destination: str | Path | None, progress: Callable[[int], object] | None
    ) -> bytes:
        content = await (self.core.perform(get) if progress is None else self._watched(get, progress))
        if destination is not None:
            await asyncio.to_thread(write, destination, content)
        return content

    async def _watched(self, get: Call[bytes], progress: Callable[[int], object]) -> bytes:
        self.core.check_open()
        content = bytearray()
        async with aclosing(self.core.service.connection.stream(self.core.request(get), _opened)) as pieces:
            async for piece in pieces:
                content += piece
                progress(len(content))
        return bytes(content)

    # ------------------------------------------------------------------------------------------- audit log

    @blocking
    def get_audit_logs(
        self,
        training_client_id: str | None = None,
        operation: str | None = None,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> Call[list[AuditLogEntry]]:
        """Return entries of the tenant's audit log, oldest first; times without a zone are taken as local time."""
        query = {
            "training_client_id": arguments.optional_text("training_client_id", training_client_id),
            "operation": arguments.optional_text("operation", operation),
            "start_time": _time("start_time", start_time),
            "end_time": _time("end_time", end_time),
            "limit": arguments.whole("limit", limit, 1, _PAGE),
            "offset": arguments.whole("offset", offset, 0),
        }
        return call(tg.AUDIT_LOGS, query=query)

    get_audit_logs_async = twin(get_audit_logs)

    @blocking
    def get_audit_head(self) -> Call[AuditHead]:
        """Return the length and last hash of the tenant's audit log, signed by the server: evidence to keep."""
        from tg_tinker.verify import AuditHead

        return call(tg.AUDIT_HEAD, decode=partial(codec.decode, AuditHead))

    get_audit_head_async = twin(get_audit_head)

    @property
    def audit_heads(self) -> tuple[AuditHead, ...]:
        """Signed heads that came with the server's answers, oldest first: the first, the newest, a spread between.

        They live as long as this service client; store them elsewhere to hold the log against them later.
        """
        return self._evidence.heads

    @blocking
    def verify_audit_log(self, heads: Sequence[AuditHead] = ()) -> Flow[AuditVerification]:
        """Fetch the tenant's whole audit log and check its chain, its end's signature, and heads from before.

        Those are ``heads``, and the ones that this service client kept (``audit_heads``). A log that was cut off or
        rewritten since one of them was signed does not pass, nor one that another key signs.
        The result names the first entry that is changed, missing or unproven. Needs ``tg-tinker[verify]``.
        """
        if not isinstance(heads, Sequence):
            raise checks.refuse("heads", "a list of AuditHead", heads)
        return Flow(operation="verify_audit_log", steps=partial(self._verify, (*heads, *self.audit_heads)))

    verify_audit_log_async = twin(verify_audit_log)

    async def _verify(self, kept: tuple[AuditHead, ...]) -> AuditVerification:
        from tg_tinker.verify import AuditHead, verify_audit_log

        head = await self.core.perform(call(tg.AUDIT_HEAD, decode=partial(codec.decode, AuditHead)))
        entries: list[AuditLogEntry] = []
        while len(entries) < head.sequence:
            page = await self.core.perform(call(tg.AUDIT_LOGS, query={"limit": _PAGE, "offset": len(entries)}))
            if not page:
                break
            entries += page
        check = partial(verify_audit_log, entries[: head.sequence], tenant_id=head.tenant_id, heads=[*kept, head])
        return await asyncio.to_thread(check)  # hashing a long log would stall the loop


def _submits(table: object) -> dict[str, Route[Any]]:
    """The long operations of a wire, by name."""
    routes = (route for route in vars(table).values() if isinstance(route, Route))
    return {route.operation: route for route in routes if route.kind == "submit"}


LOOPS_RUN = "run-"  # how ids of Loops runs begin; those of TG runs begin with "tc-"
_TG = _submits(tg)
_LOOPS = _submits(loops)


def _time(field: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise checks.refuse(field, "a datetime, or None", value)
    try:
        return value.astimezone(UTC).isoformat()
    except (ValueError, OverflowError):  # the first or last hours of the calendar, in another zone
        raise checks.refuse(field, "a time that UTC has as well", value) from None


def _body(reply: Reply) -> bytes:
    return reply.body


def _nothing(_: object) -> None:
    """What a deletion answers."""


def _opened() -> None:
    """A pull has no place in any order that it could give up."""
