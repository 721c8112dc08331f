"""Small requests of the Loops wire, as coroutines that run at home: checkpoints, their files, served versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin

import attrs

from tg_tinker.core.call import call
from tg_tinker.core.reply import Reply
from tg_tinker.core.run import RunCore
from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.types import arguments, checks
from tg_tinker.types.loops_results import Checkpoint, CheckpointFile, CheckpointFilesResponse
from tg_tinker.wire import codec, headers, loops

__all__ = [
    "all_files",
    "archive_page",
    "checkpoint_at",
    "checkpoint_path",
    "checkpoints_of",
    "fields",
    "is_ours",
    "pinned_to",
    "sampler_path",
    "served_version",
]

PREFIX = "bt://loops:"
_PAGE = 1000
_ANSWER_SLACK = 15.0  # seconds that an answer may be later than the hold it was asked for


def fields(request: object) -> dict[str, Any]:
    """The body of a request: its fields without those that say nothing."""
    named = ((field.name, getattr(request, field.name)) for field in attrs.fields(type(request)))  # type: ignore[arg-type]
    return {name: value for name, value in named if value is not None}


def is_ours(base_url: str) -> bool:
    """Whether a data plane is on the very server that named it, as ours are."""
    return base_url.startswith("/")


def checkpoint_path(path: object, field: str = "path") -> str:
    """A checkpoint URI, checked as far as a client can."""
    parts = path.removeprefix(PREFIX).split("/") if isinstance(path, str) and path.startswith(PREFIX) else []
    if not isinstance(path, str) or len(parts) != 3 or not all(parts):
        raise checks.refuse(field, f"{PREFIX}<run_id>/weights/<name> (or .../sampler_weights/<name>)", path)
    return path


def sampler_path(path: object) -> str:
    """The URI of a checkpoint that serves sampling; a state holds the optimizer besides, and is for resuming."""
    checked = checkpoint_path(path, "model_path")
    if checked.split("/")[-2] != "sampler_weights":
        raise checks.refuse("model_path", f"{PREFIX}<run_id>/sampler_weights/<name>: a state is to resume from", path)
    return checked


def pinned_to(path: str | None) -> dict[str, str]:
    """The headers of a sampler's requests that hold it to a checkpoint."""
    return {} if path is None else {headers.CHECKPOINT_PATH: path}


async def served_version(core: RunCore, base: str, minimum: int, hold: float) -> tuple[int, bool]:
    """The newest version that a sampler serves, answered when it is ``minimum`` or ``hold`` seconds later.

    With it, whether this server takes exact versions.
    """
    ask = call(
        loops.SERVED_VERSION,
        base=base,
        query={"min": minimum, "wait": f"{hold:.3f}"},
        decode=_version,
        whole_reply=True,
        timeout=hold + _ANSWER_SLACK,
    )
    return await core.perform(ask)


def _version(reply: Reply) -> tuple[int, bool]:
    offered = reply.headers.get(headers.EXTENSIONS, "")
    answer = codec.decode(loops.PolicyVersion, reply.json())
    return answer.policy_version, "exact-version" in {name.strip() for name in offered.split(",")}


async def checkpoints_of(core: RunCore, run_id: str) -> list[Checkpoint]:
    """A run's checkpoints."""
    envelope = await core.perform(call(loops.CHECKPOINTS, query={"run_id": run_id}))
    return list(envelope.checkpoints)


async def checkpoint_at(core: RunCore, path: str) -> Checkpoint:
    """The checkpoint behind a URI. Raises ``ResourceNotFoundError`` where there is none."""
    envelope = await core.perform(call(loops.CHECKPOINTS, query={"checkpoint_path": path}))
    if not envelope.checkpoints:
        message = f"there is no checkpoint {path}"
        raise ResourceNotFoundError(message, resource_type="checkpoint", resource_id=path)
    return envelope.checkpoints[0]


def page(page_size: object, page_token: object) -> dict[str, int]:
    """Which part of a listing is asked for. Raises ``InvalidRequestError`` by name."""
    return {
        "page_size": arguments.whole("page_size", page_size, 1, 1000),
        "page_token": arguments.whole("page_token", page_token, 0),
    }


async def archive_page(
    core: RunCore, checkpoint: str, page: Mapping[str, int], *, run_id: str | None, target: str | None = None
) -> CheckpointFilesResponse:
    """A page of a checkpoint's files; ``checkpoint`` is its URI, its ``id``, or in a run its name."""
    if checkpoint.startswith(PREFIX):
        return await _files(core, (await checkpoint_at(core, checkpoint)).id, page)
    try:
        return await _files(core, checkpoint, page)
    except ResourceNotFoundError:
        if run_id is None:
            raise
        found = await _named(core, checkpoint, run_id, target)
        return await _files(core, found.id, page)


async def all_files(
    core: RunCore, checkpoint: str, *, run_id: str | None, target: str | None = None
) -> list[CheckpointFile]:
    """Every file of a checkpoint, which goes by the same names."""
    files: list[CheckpointFile] = []
    token: int | None = 0
    while token is not None:
        asked = {"page_size": _PAGE, "page_token": token}
        page = await archive_page(core, checkpoint, asked, run_id=run_id, target=target)
        files += page.presigned_urls
        token = page.next_page_token if page.presigned_urls else None
    return files


async def _files(core: RunCore, checkpoint_id: str, page: Mapping[str, int]) -> CheckpointFilesResponse:
    answer = await core.perform(call(loops.CHECKPOINT_FILES, parts={"id": checkpoint_id}, query=page))
    base, _ = await core.service.connection.endpoint.resolve()
    files = tuple(attrs.evolve(file, url=urljoin(base, file.url)) for file in answer.presigned_urls)
    return attrs.evolve(answer, presigned_urls=files)


async def _named(core: RunCore, name: str, run_id: str, target: str | None) -> Checkpoint:
    """The newest checkpoint of a run by its name; a trainer's goes before a sampler's of the same name."""
    all_of = await checkpoints_of(core, run_id)
    named = [one for one in all_of if one.checkpoint_id == name and target in {None, one.target}]
    if not named:
        message = f"run {run_id} has no checkpoint {name!r}{f' for a {target}' if target else ''}"
        raise ResourceNotFoundError(message, resource_type="checkpoint", resource_id=name)
    return max(named, key=lambda one: (one.target == "trainer", one.created_at))
