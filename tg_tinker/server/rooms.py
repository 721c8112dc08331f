"""Everything one server process is made of, put together in one place and taken down in the reverse order."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from tg_tinker.errors import InvalidRequestError, ServerError, ServerRestartedError
from tg_tinker.server.auth import Keys
from tg_tinker.server.creation import Creation
from tg_tinker.server.engine import Engine, TorchEngine
from tg_tinker.server.limits import Admission, RateLimit
from tg_tinker.server.ownership import Ownership, folder_of
from tg_tinker.server.records.auditing import Auditing
from tg_tinker.server.records.journal import Journal
from tg_tinker.server.records.recording import Recording
from tg_tinker.server.records.recovery import Recovery
from tg_tinker.server.records.ticket_book import Tickets
from tg_tinker.server.records.trail import Trail
from tg_tinker.server.serving.published import Published
from tg_tinker.server.serving.samplers import Samplers
from tg_tinker.server.settings import Settings
from tg_tinker.server.sweeping import Sweeping
from tg_tinker.server.training.exports import Exports
from tg_tinker.server.training.registry import Registry
from tg_tinker.server.training.runs import Runs
from tg_tinker.server.weights.models import Models
from tg_tinker.server.work.scheduler import Scheduler, tell

if TYPE_CHECKING:
    from tg_tinker.store.audit import HeadSigner
    from tg_tinker.store.checkpoints import CheckpointStore
    from tg_tinker.store.database import Database

_log = logging.getLogger("tg_tinker.server")


class Rooms:
    """The parts that handlers work with; made and closed on the event loop."""

    def __init__(self, settings: Settings, engine: Engine | None, report: Callable[[str], None]) -> None:
        self.settings = settings
        self.engine: Engine = engine or TorchEngine(
            home=settings.home, device=settings.device, threads=settings.threads, slots=settings.slots
        )
        self.crashed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(
            prepare=self.engine.prepare_thread, on_crash=lambda error: tell(loop, self._crash, error)
        )
        self.tickets = Tickets(
            self.scheduler,
            kept=settings.results_kept,
            bytes_kept=settings.result_bytes_kept,
            queue_limit=settings.queue_limit,
        )
        self.models = Models(settings, self.engine, self.scheduler, report)
        self.runs = Runs()
        self.samplers = Samplers()
        self.published = Published(self)
        self.creation = Creation(self)
        self.rate_limit = RateLimit(settings.requests_per_minute)
        self.sampling = Admission(settings.queue_limit)
        self.store: CheckpointStore
        self.database: Database
        self.keys: Keys
        self.journal: Journal
        self.registry: Registry
        self.auditing: Auditing
        self.recording: Recording
        self.sweeping: Sweeping
        self.exports: Exports
        self._ownership: Ownership
        # A daemon: the server may end while torch is still being imported, and nobody should wait for that.
        self.warming = threading.Thread(target=self._warm, name="tg-tinker-warm", daemon=True)

    @classmethod
    async def open(cls, settings: Settings, engine: Engine | None, report: Callable[[str], None]) -> Rooms:
        """Start the device thread, open the store, and begin to import what takes long."""
        rooms = cls(settings, engine, report)
        await rooms._open_storage()
        try:
            settings.check_address(has_keys=await rooms.keys.usable())
        except InvalidRequestError:
            await rooms._close_storage()
            raise
        rooms.scheduler.start()
        rooms.warming.start()
        return rooms

    def _crash(self, error: BaseException) -> None:
        """Without a device thread nothing goes on: say so to everybody, and to the process."""
        self.tickets.close(ServerError(f"the server's device thread broke down: {type(error).__name__}: {error}"))
        self.crashed.set()

    def stop(self) -> None:
        """Answer everybody who waits: the server is about to end."""
        self.tickets.close(ServerRestartedError("the server was shut down before the operation ended"))
        for run in self.runs:
            run.versions.close()

    async def aclose(self) -> None:
        """Stop at the next micro-batch; what is being saved is saved."""
        await self.models.aclose()
        await asyncio.to_thread(self.scheduler.close)
        await asyncio.to_thread(self._clear_aside)
        await self._close_storage()

    async def _close_storage(self) -> None:
        await self.sweeping.aclose()
        await self.recording.aclose()
        await self.database.close()
        self._ownership.release()

    async def _open_storage(self) -> None:
        from tg_tinker.store.audit import AuditLog
        from tg_tinker.store.database import Database, database_file, sqlite_url

        settings = self.settings
        files = await asyncio.to_thread(_Files.open, settings)
        self.store, self._ownership = files.store, files.ownership
        self.exports = Exports(files.store, files.file_key)
        self.database = await Database.open(sqlite_url(database_file(settings.home)))
        self.keys = Keys(settings, self.database)
        self.registry = Registry(self.database, files.ownership)
        log = AuditLog(self.database, files.signer)
        trails = folder_of(settings.home)
        recovery = Recovery(self.database, log, files.ownership, trails, kept=settings.results_kept)
        await recovery.after_all()
        await asyncio.to_thread(files.ownership.forget_dead)
        self.journal = Journal(self.database, files.ownership, recovery, kept=settings.results_kept)
        self.auditing = Auditing(log, files.audit_key)
        self.recording = Recording(Trail(trails, files.ownership.name), self.journal, self.auditing)
        self.sweeping = Sweeping(self)
        self.recording.start()
        self.sweeping.start()
        self.tickets.on_accept.append(self.recording.accepted)
        self.tickets.on_end.append(self.recording.ended)

    def _clear_aside(self) -> None:
        """The runs end here, and with them those who are pinned to their versions."""
        for tenant in {run.tenant for run in self.runs}:
            self.store.clear_aside(tenant, *(run.id for run in self.runs if run.tenant == tenant))

    def _warm(self) -> None:
        try:
            self.engine.warm()
        # Importing torch can fail in any way; whoever needs it first is told, and the log says why.
        except Exception:  # noqa: BLE001
            _log.exception("the engine cannot be imported")


@attrs.frozen
class _Files:
    """What lives in files of the home folder."""

    store: CheckpointStore
    ownership: Ownership
    signer: HeadSigner
    audit_key: bytes
    file_key: bytes

    @classmethod
    def open(cls, settings: Settings) -> _Files:
        from tg_tinker.store import files
        from tg_tinker.store.audit import HeadSigner
        from tg_tinker.store.checkpoints import CheckpointStore
        from tg_tinker.store.keys import provider_of

        home = settings.home
        secret = files.secret(home / "secrets" / "server-secret")
        return cls(
            CheckpointStore(home / "artifacts", provider_of(home), quota=settings.quota_bytes),
            Ownership(home),
            HeadSigner(home / "secrets" / "audit-key"),
            files.subkey(secret, "input digests"),
            files.subkey(secret, "signed URLs"),
        )
