"""What a server keeps beyond its own life: artifacts, database, keys, records. Opened together, closed together."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import attrs

from tg_tinker.server.auth import Keys
from tg_tinker.server.ownership import Ownership, folder_of
from tg_tinker.server.records.auditing import Auditing
from tg_tinker.server.records.journal import Journal
from tg_tinker.server.records.recording import Recording
from tg_tinker.server.records.recovery import Recovery
from tg_tinker.server.records.trail import Trail
from tg_tinker.server.settings import Settings
from tg_tinker.server.training.exports import Exports
from tg_tinker.server.training.registry import Registry

if TYPE_CHECKING:
    from tg_tinker.store.audit import HeadSigner
    from tg_tinker.store.checkpoints import CheckpointStore
    from tg_tinker.store.database import Database


@attrs.frozen(eq=False, kw_only=True)
class Storage:
    """The parts that write to the home folder."""

    store: CheckpointStore
    exports: Exports
    database: Database
    keys: Keys
    registry: Registry
    journal: Journal
    auditing: Auditing
    recording: Recording
    ownership: Ownership

    @classmethod
    async def open(cls, settings: Settings) -> Storage:
        """Open everything, or nothing; what servers that died left unfinished is completed first."""
        from tg_tinker.store.database import Database, database_file
        from tg_tinker.store.sqlite import sqlite_url

        files = await asyncio.to_thread(_Files.open, settings)
        async with AsyncExitStack() as opened:
            opened.callback(files.ownership.release)
            database = await Database.open(sqlite_url(database_file(settings.home)))
            opened.push_async_callback(database.close)
            storage = await cls._over(settings, files, database)
            opened.pop_all()
        return storage

    @classmethod
    async def _over(cls, settings: Settings, files: _Files, database: Database) -> Storage:
        from tg_tinker.store.audit import AuditLog

        log = AuditLog(database, files.signer)
        trails = folder_of(settings.home)
        recovery = Recovery(database, log, files.ownership, trails, kept=settings.results_kept)
        await recovery.after_all()
        await asyncio.to_thread(files.ownership.forget_dead)
        journal = Journal(database, files.ownership, recovery, kept=settings.results_kept)
        auditing = Auditing(log, files.audit_key)
        recording = Recording(Trail(trails, files.ownership.name), journal, auditing)
        recording.start()
        return cls(
            store=files.store,
            exports=Exports(files.store, files.file_key),
            database=database,
            keys=Keys(settings, database),
            registry=Registry(database, files.ownership),
            journal=journal,
            auditing=auditing,
            recording=recording,
            ownership=files.ownership,
        )

    async def aclose(self) -> None:
        """Write what is still to be written, and let go of the home, also where that fails."""
        async with AsyncExitStack() as closing:
            closing.callback(self.ownership.release)
            closing.push_async_callback(self.database.close)
            await self.recording.aclose()


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
            store=CheckpointStore(home / "artifacts", provider_of(home), quota=settings.quota_bytes),
            signer=HeadSigner(home / "secrets" / "audit-key"),
            audit_key=files.subkey(secret, "input digests"),
            file_key=files.subkey(secret, "signed URLs"),
            ownership=Ownership(home),  # last: nobody would give the name up if another of these failed
        )
