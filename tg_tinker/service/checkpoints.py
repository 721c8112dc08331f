"""What a ``ServiceClient`` offers of Loops checkpoints: listed, addressed, downloaded."""

from __future__ import annotations

import os
from functools import partial
from typing import Literal

from tg_tinker.core.call import Flow
from tg_tinker.faces import blocking, twin
from tg_tinker.loops import download, plane
from tg_tinker.loops.download import Told
from tg_tinker.service.base import ServiceBase
from tg_tinker.types import arguments
from tg_tinker.types.loops_results import Checkpoint, CheckpointDownload, CheckpointFilesResponse

__all__ = ["CheckpointService"]

Target = Literal["trainer", "sampler"]


class CheckpointService(ServiceBase):
    """The checkpoints' part of ``ServiceClient``. A checkpoint goes by its id or its URI, or by run and name."""

    @blocking
    def list_checkpoints(self, run_id: str) -> Flow[list[Checkpoint]]:
        """List a run's checkpoints."""
        steps = partial(plane.checkpoints_of, self.core, arguments.text("run_id", run_id))
        return Flow(operation="list_checkpoints", steps=steps)

    list_checkpoints_async = twin(list_checkpoints)

    @blocking
    def get_checkpoint_archive_url(
        self,
        checkpoint_id: str | None = None,
        name: str | None = None,
        run_id: str | None = None,
        target: Target | None = None,
        page_size: int = 1000,
        page_token: int = 0,
    ) -> Flow[CheckpointFilesResponse]:
        """Return signed URLs of a checkpoint's files, page by page; it goes by its id, or by run and name.

        ``target`` tells a trainer's and a sampler's checkpoint of the same name apart.
        """
        wanted = download.wanted(checkpoint_id, name, run_id, target)
        page = plane.page(page_size, page_token)
        steps = partial(plane.archive_page, self.core, wanted, page, run_id=run_id, target=target)
        return Flow(operation="get_checkpoint_archive_url", steps=steps)

    get_checkpoint_archive_url_async = twin(get_checkpoint_archive_url)

    @blocking
    def download_checkpoint(
        self,
        checkpoint_id: str | None = None,
        *,
        dest_dir: str | os.PathLike[str],
        name: str | None = None,
        run_id: str | None = None,
        target: Target | None = None,
        progress: Told | None = None,
    ) -> Flow[CheckpointDownload]:
        """Fetch a checkpoint's files into the folder ``dest_dir``, which is made where it is missing.

        ``checkpoint_id`` is an id or a ``bt://loops:`` URI; ``name`` goes with ``run_id``. Eight files are fetched side
        by side, each checked against its size and SHA-256. A download that was broken off goes on where it ended, from
        its ``.part`` files; files that are there whole are left alone. ``progress(done, total)`` is called now and then
        with bytes, on the client's home.

        Raises ``InvalidRequestError`` where a file of another content is in the way, ``ServerError`` for a file that is
        not what was announced (``BAD_FILE``) or whose name leads out of the folder (``UNSAFE_NAME``),
        ``ResourceNotFoundError`` where there is no such checkpoint.
        """
        wanted = download.wanted(checkpoint_id, name, run_id, target)
        listing = partial(plane.all_files, self.core, wanted, run_id=run_id, target=target)
        return download.plan(self.core, listing, dest_dir, progress)

    download_checkpoint_async = twin(download_checkpoint)
