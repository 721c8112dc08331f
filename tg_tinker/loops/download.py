"""A checkpoint's files, fetched side by side into a folder; what is there already is not fetched again.

A transfer that breaks goes on where it broke, and addresses that have expired meanwhile are asked for anew. Runs at
home; the file work is ``part_file``'s, in worker threads.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tg_tinker.core.call import Flow
from tg_tinker.core.reply import Reply
from tg_tinker.core.run import RunCore
from tg_tinker.core.transport import Request
from tg_tinker.errors import (
    AuthorizationError,
    QueueFullError,
    RateLimitedError,
    ServerError,
    ServerUnreachableError,
    TGTinkerError,
)
from tg_tinker.loops.part_file import BAD_FILE, PartFile, bad_file, place_all
from tg_tinker.types import arguments, checks
from tg_tinker.types.loops_results import CheckpointDownload, CheckpointFile

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Listing", "Told", "plan", "wanted"]

Listing = Callable[[], Awaitable[list[CheckpointFile]]]
#: Called now and then with the bytes that are there and the bytes in all.
Told = Callable[[int, int], object]

SIDE_BY_SIDE = 8
_TARGETS = ("trainer", "sampler")
_PIECE = 256 * 1024  # bytes
_PASSING = (AuthorizationError, QueueFullError, RateLimitedError, ServerError, ServerUnreachableError)
_FROM = re.compile(r"bytes (\d+)-")


def plan(core: RunCore, listing: Listing, dest_dir: object, told: object) -> Flow[CheckpointDownload]:
    """Fetch every file that ``listing`` names into a folder; see ``ServiceClient.download_checkpoint``."""
    if not isinstance(dest_dir, str | os.PathLike) or not os.fspath(dest_dir):
        raise checks.refuse("dest_dir", "a folder to write to", dest_dir)
    if told is not None and not callable(told):
        raise checks.refuse("progress", "a function of two numbers of bytes, or None", told)
    folder = Path(dest_dir).expanduser()
    return Flow(operation="download_checkpoint", steps=partial(_download, core, listing, folder, told))


def wanted(checkpoint_id: object, name: object, run_id: object, target: object) -> str:
    """What a checkpoint is asked for by: its id or URI, or its name in a run."""
    if (checkpoint_id is None) == (name is None):
        raise checks.refuse("checkpoint_id", "exactly one of checkpoint_id and name", checkpoint_id)
    if name is not None and run_id is None:
        raise checks.refuse("run_id", "a run beside the name", None)
    if target is not None and target not in _TARGETS:
        raise checks.refuse("target", "'trainer', 'sampler' or None", target)
    return arguments.text("checkpoint_id", checkpoint_id) if name is None else arguments.text("name", name)


async def _download(core: RunCore, listing: Listing, folder: Path, told: Told | None) -> CheckpointDownload:
    transfer = Transfer(core, listing, told)
    await transfer.begin(folder)
    try:
        async with asyncio.TaskGroup() as group:
            for part in transfer.parts:
                group.create_task(transfer.fetch(part), name=f"download {part.name}")
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    fetched = sum(part.fetched for part in transfer.parts)
    return CheckpointDownload(dest_dir=str(folder), file_count=len(transfer.parts), bytes_written=fetched)


class Transfer:
    """The files of one download, and where they are to be had."""

    def __init__(self, core: RunCore, listing: Listing, told: Told | None) -> None:
        self.parts: list[PartFile] = []
        self._core = core
        self._listing = listing
        self._told = told
        self._urls: dict[str, str] = {}
        self._renewing = asyncio.Lock()
        self._slots = asyncio.Semaphore(SIDE_BY_SIDE)

    async def begin(self, folder: Path) -> None:
        """Learn which files there are; nothing is written where one of their names is not safe."""
        files = await self._listing()
        self.parts = await asyncio.to_thread(place_all, folder, files)
        self._urls = {file.relative_file_name: file.url for file in files}

    async def fetch(self, part: PartFile) -> None:
        """Fetch one file whole, in as many tries as it takes while each of them brings something."""
        async with self._slots:
            if await asyncio.to_thread(part.look):
                self._tell()
                return
            await self._fill(part)
            await asyncio.to_thread(part.finish)
            self._tell()

    async def _fill(self, part: PartFile) -> None:
        policy, idle = self._core.service.connection.policy, 0
        while part.have < part.size:
            before, url = part.have, self._urls[part.name]
            failure: TGTinkerError = bad_file(part.name, f"ends after {before} of {part.size} bytes")
            try:
                await self._stream(part, url)
            except TGTinkerError as error:
                if not _passes(error):
                    raise
                failure = error
            idle = 0 if part.have > before else idle + 1
            if idle > (1 if isinstance(failure, AuthorizationError) else policy.count):
                raise failure
            if part.have < part.size:
                await asyncio.sleep(policy.delay(idle + 1, None))
                await self._renew(part, url, failure)

    async def _renew(self, part: PartFile, url: str, failure: TGTinkerError) -> None:
        """Ask for new addresses where the old ones have expired, once for all files."""
        if isinstance(failure, AuthorizationError):
            async with self._renewing:
                if self._urls[part.name] == url:
                    self._urls |= {file.relative_file_name: file.url for file in await self._listing()}

    async def _stream(self, part: PartFile, url: str) -> None:
        connection = self._core.service.connection
        asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={part.have}-"} if part.have else {})
        request = Request(method="GET", path=url, headers=asked, timeout=connection.timeout, keyless=True)
        async with connection.exchange(request) as response:
            if response.status not in {200, 206, 416}:
                raise Reply(response.status, response.headers, await response.read()).error()
            if not _goes_on(response, part.have):
                await asyncio.to_thread(part.restart)
                if response.status != 200:
                    return
            async for piece in response.content.iter_chunked(_PIECE):
                await asyncio.to_thread(part.append, piece)
                self._tell()

    def _tell(self) -> None:
        if self._told is not None:
            self._told(sum(part.have for part in self.parts), sum(part.size for part in self.parts))


def _goes_on(response: aiohttp.ClientResponse, have: int) -> bool:
    """Whether the answer starts where our bytes end; a server may as well send the whole file again."""
    if response.status != 206:
        return have == 0
    start = _FROM.match(response.headers.get("Content-Range", ""))
    return start is not None and int(start[1]) == have


def _passes(error: TGTinkerError) -> bool:
    """Whether another try may end better."""
    return isinstance(error, _PASSING) and error.code != BAD_FILE
