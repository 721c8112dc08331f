"""The parts that one server process works with, put together in one place and taken down in the reverse order."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack

from tg_tinker.errors import InvalidRequestError, ServerError, ServerRestartedError, TGTinkerError
from tg_tinker.server.engine import Engine, TorchEngine
from tg_tinker.server.limits import Admission, RateLimit
from tg_tinker.server.records.ticket_book import Tickets
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.server.serving.published import Published
from tg_tinker.server.serving.samplers import Samplers
from tg_tinker.server.settings import Settings
from tg_tinker.server.storage import Storage
from tg_tinker.server.training.runs import Runs
from tg_tinker.server.weights.models import Models
from tg_tinker.server.work.scheduler import Scheduler, tell

_log = logging.getLogger("tg_tinker.server")


class Rooms:
    """What handlers reach for; made and closed on the event loop."""

    def __init__(self, settings: Settings, storage: Storage, engine: Engine, report: Callable[[str], None]) -> None:
        self.settings = settings
        self.engine = engine
        self._storage = storage
        self.store, self.exports, self.database = storage.store, storage.exports, storage.database
        self.keys, self.registry, self.journal = storage.keys, storage.registry, storage.journal
        self.auditing, self.recording = storage.auditing, storage.recording
        self.crashed = asyncio.Event()
        self.crash: TGTinkerError | None = None
        self._loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(prepare=engine.prepare_thread, on_crash=self._crashed_with)
        self.tickets = Tickets(
            self.scheduler,
            kept=settings.results_kept,
            bytes_kept=settings.result_bytes_kept,
            queue_limit=settings.queue_limit,
        )
        self.tickets.on_accept.append(self.recording.accepted)
        self.tickets.on_end += [self.recording.ended, _log_end]
        self.models = Models(settings, engine, self.scheduler, report)
        self.runs = Runs()
        self.samplers = Samplers()
        self.published = Published(self.runs, self.store, engine, self.scheduler)
        self.rate_limit = RateLimit(settings.requests_per_minute)
        self.sampling = Admission(settings.queue_limit)
        # A daemon: the server may end while torch is still being imported, and nobody should wait for that.
        self.warming = threading.Thread(target=self._warm, name="tg-tinker-warm", daemon=True)

    @classmethod
    async def open(cls, settings: Settings, engine: Engine | None, report: Callable[[str], None]) -> Rooms:
        """Open the storage, start the device thread, and begin to import what takes long.

        Raises ``InvalidRequestError`` where others could reach this server and nobody has a key.
        """
        storage = await Storage.open(settings)
        try:
            settings.check_address(has_keys=await storage.keys.usable())
            rooms = cls(settings, storage, engine or _torch_engine(settings), report)
        except BaseException:  # whatever it was, the home must not stay locked
            await storage.aclose()
            raise
        rooms.scheduler.start()
        rooms.warming.start()
        return rooms

    def _crashed_with(self, error: BaseException) -> None:
        """Without a device, or a thread for it, nothing goes on: say so to everybody, and to the process."""
        told = ServerError(f"the server's device thread broke down: {type(error).__name__}: {error}")
        tell(self._loop, self._crash, error if isinstance(error, InvalidRequestError) else told)

    def _crash(self, error: TGTinkerError) -> None:
        self.crash = error
        self.tickets.close(error)
        self.crashed.set()

    def stop(self) -> None:
        """Answer everybody who waits: the server is about to end."""
        self.tickets.close(ServerRestartedError("the server was shut down before the operation ended"))
        for run in self.runs:
            run.versions.close()

    async def aclose(self) -> None:
        """Stop at the next micro-batch; what is being saved is saved."""
        async with AsyncExitStack() as closing:  # in the reverse order, each also where one before it fails
            closing.push_async_callback(self._storage.aclose)
            closing.push_async_callback(asyncio.to_thread, self._clear_aside)
            closing.push_async_callback(asyncio.to_thread, self.scheduler.close)
            await self.models.aclose()

    def _clear_aside(self) -> None:
        """The runs end here, and with them those who are pinned to their versions."""
        for tenant in {run.tenant for run in self.runs}:
            self.store.clear_aside(tenant, *(run.id for run in self.runs if run.tenant == tenant))

    def _warm(self) -> None:
        try:
            self.engine.warm()
        except InvalidRequestError as error:
            self._crashed_with(error)
        # Importing torch can fail in any way; whoever needs it first is told, and the log says why.
        except Exception:  # noqa: BLE001
            _log.exception("the engine cannot be imported")


def _log_end(ticket: Ticket) -> None:
    told = ticket.operation, ticket.id, ticket.run_id, ticket.status, ticket.ended - ticket.accepted, ticket.request_id
    _log.log(logging.INFO if ticket.failure else logging.DEBUG, "%s %s of %s: %s, %.3f s [%s]", *told)


def _torch_engine(settings: Settings) -> Engine:
    return TorchEngine(home=settings.home, device=settings.device, threads=settings.threads, slots=settings.slots)
