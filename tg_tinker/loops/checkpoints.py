"""The checkpoints of one run, as its ``TrainingClient`` shows them: listed, addressed, downloaded."""

from __future__ import annotations

import os
from functools import partial
from typing import Literal

from tg_tinker.core.call import Flow
from tg_tinker.core.run import RunCore
from tg_tinker.faces import blocking, twin
from tg_tinker.loops import download, plane
from tg_tinker.loops.closing import Closing
from tg_tinker.loops.download import Told
from tg_tinker.types import arguments
from tg_tinker.types.loops_results import Checkpoint, CheckpointDownload, CheckpointFilesResponse
from tg_tinker.wire import loops

__all__ = ["RunCheckpoints"]


class RunCheckpoints(Closing):
    """The part of a ``TrainingClient`` that needs no trainer, only its run's id."""

    def __init__(self, core: RunCore, run: loops.Run) -> None:
        super().__init__(core)
        self._run = run

    @property
    def run_id(self) -> str | None:
        """The run that this client is bound to."""
        return self._run.id

    @blocking
    def list_checkpoints(self) -> Flow[list[Checkpoint]]:
        """List this run's checkpoints."""
        return Flow(operation="list_checkpoints", steps=partial(plane.checkpoints_of, self._core, self._run.id))

    list_checkpoints_async = twin(list_checkpoints)

    @blocking
    def get_checkpoint_archive_url(
        self, checkpoint_id: str, page_size: int = 1000, page_token: int = 0
    ) -> Flow[CheckpointFilesResponse]:
        """Return signed URLs of a checkpoint's files, page by page; ``checkpoint_id`` is its name or its ``id``."""
        wanted, page = arguments.text("checkpoint_id", checkpoint_id), plane.page(page_size, page_token)
        steps = partial(plane.archive_page, self._core, wanted, page, run_id=self._run.id)
        return Flow(operation="get_checkpoint_archive_url", steps=steps)

    get_checkpoint_archive_url_async = twin(get_checkpoint_archive_url)

    @blocking
    def download_checkpoint(
        self,
        checkpoint_id: str | None = None,
        *,
        dest_dir: str | os.PathLike[str],
        name: str | None = None,
        target: Literal["trainer", "sampler"] | None = None,
        progress: Told | None = None,
    ) -> Flow[CheckpointDownload]:
        """Fetch a checkpoint of this run, by its name or ``id``, as ``ServiceClient.download_checkpoint`` does."""
        wanted = download.wanted(checkpoint_id, name, self._run.id, target)
        listing = partial(plane.all_files, self._core, wanted, run_id=self._run.id, target=target)
        return download.plan(self._core, listing, dest_dir, progress)

    download_checkpoint_async = twin(download_checkpoint)
