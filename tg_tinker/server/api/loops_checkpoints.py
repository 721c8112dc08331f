"""The Loops control plane's checkpoints: listed, validated, and their files behind signed URLs."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from aiohttp import web

from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker.server.api import common, query
from tg_tinker.server.middleware import error_response, event_id
from tg_tinker.server.serving.published import check_serves
from tg_tinker.types import checks
from tg_tinker.types.loops_results import Checkpoint, CheckpointFile, CheckpointFilesResponse, LoraAdapterConfig
from tg_tinker.wire import loops as wire
from tg_tinker.wire.checkpoint_uri import SAMPLER_WEIGHTS, WEIGHTS, CheckpointUri

if TYPE_CHECKING:
    from tg_tinker.store.checkpoints import ArtifactRecord

FILE = "/v1/loops/files/{token}/{name}"


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.get(wire.CHECKPOINTS.path, list_checkpoints),
        web.post(wire.CHECKPOINT_VALIDATE.path, validate),
        web.get(wire.CHECKPOINT_FILES.path, files),
        web.get(wire.CHECKPOINT_SOURCE.path, source),
        web.get(FILE, file),
    ]


async def list_checkpoints(request: web.Request) -> web.Response:
    """The checkpoints of a run, of a base model, or behind one URI, oldest first."""
    store, tenant, given = common.rooms_of(request).store, common.tenant_of(request), request.query
    asked = [name for name in ("run_id", "base_model", "checkpoint_path") if name in given]
    if len(asked) != 1:
        raise checks.refuse("run_id", "exactly one of run_id, base_model and checkpoint_path", asked)
    if asked == ["checkpoint_path"]:
        uri = CheckpointUri.parse(given["checkpoint_path"], "checkpoint_path")
        records = [await asyncio.to_thread(store.find, tenant, uri.run_id, uri.kind, uri.name)]
    else:
        records = list(await asyncio.to_thread(store.list, tenant, given.get("run_id")))
    base = given.get("base_model")
    chosen = [r for r in records if r.kind in {WEIGHTS, SAMPLER_WEIGHTS} and base in {None, r.metadata["base_model"]}]
    return common.reply({"checkpoints": [_view(record) for record in chosen]})


async def validate(request: web.Request) -> web.Response:
    """An empty object for a checkpoint that is there and serves sampling, which is what clients ask for."""
    body = await common.read_as(request, dict)
    uri = CheckpointUri.parse(body.get("checkpoint_path"), "checkpoint_path")
    check_serves(uri)
    store, tenant = common.rooms_of(request).store, common.tenant_of(request)
    await asyncio.to_thread(store.find, tenant, uri.run_id, uri.kind, uri.name)
    return common.reply({})


async def files(request: web.Request) -> web.Response:
    """A page of a checkpoint's files, each behind a signed URL."""
    rooms, tenant = common.rooms_of(request), common.tenant_of(request)
    size = query.whole(request, "page_size", query.PAGE, 1, query.PAGE)
    start = query.whole(request, "page_token", 0)
    record = await asyncio.to_thread(rooms.store.get, tenant, request.match_info["id"])
    if record.kind not in {WEIGHTS, SAMPLER_WEIGHTS}:
        raise InvalidRequestError("id: this artifact is no Loops checkpoint; pull it instead", field="id")
    made = await rooms.exports.files(tenant, record.artifact_id)
    page = list(made.items())[start : start + size]
    end = start + len(page)
    urls = tuple(_file(request, record, name, content) for name, content in page)
    token = end if end < len(made) else None
    return common.reply(CheckpointFilesResponse(presigned_urls=urls, next_page_token=token, total_count=len(made)))


async def source(request: web.Request) -> web.Response:
    """How to fetch a checkpoint: "s3" is what Loops clients call files behind signed URLs."""
    store, tenant = common.rooms_of(request).store, common.tenant_of(request)
    await asyncio.to_thread(store.get, tenant, request.match_info["id"])
    return common.reply({"source": {"kind": "s3"}})


async def file(request: web.Request) -> web.Response:
    """One file, to whoever holds its signed URL."""
    rooms, name = common.rooms_of(request), request.match_info["name"]
    grant = rooms.exports.verify(request.match_info["token"], name)
    rooms.rate_limit.take(grant.tenant)
    pulled = partial(rooms.auditing.happened, grant.tenant, "pull_checkpoint_file", event_id(request))
    try:
        content = await rooms.exports.content(grant)
    except TGTinkerError as error:
        await pulled(error, artifact_ids_consumed=(grant.artifact_id,))
        raise
    await pulled(artifact_ids_consumed=(grant.artifact_id,))
    guarded = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "Content-Disposition": "attachment"}
    return _piece(request, content, guarded)


def _piece(request: web.Request, content: bytes, headers: dict[str, str]) -> web.Response:
    """A file whole, or from the byte on that a broken download asks to go on from."""
    try:
        start, stop, _ = request.http_range.indices(len(content))
    except ValueError:
        raise checks.refuse("Range", "one range of bytes", request.headers.get("Range")) from None
    kind, headers = "application/octet-stream", {**headers, "Accept-Ranges": "bytes"}
    if "Range" not in request.headers:
        return web.Response(body=content, content_type=kind, headers=headers)
    if start >= stop:
        error = checks.refuse("Range", f"bytes before {len(content)}", request.headers["Range"])
        refusal = error_response(request, error, 416)
        refusal.headers.update({**headers, "Content-Range": f"bytes */{len(content)}"})
        return refusal
    told = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
    return web.Response(status=206, body=content[start:stop], content_type=kind, headers=told)


def _file(request: web.Request, record: ArtifactRecord, name: str, content: bytes) -> CheckpointFile:
    token = common.rooms_of(request).exports.sign(record.tenant, record.artifact_id, name)
    path = FILE.format(token=token, name=quote(name, safe=""))
    return CheckpointFile(
        url=common.own_url(request, path),
        relative_file_name=name,
        size_bytes=len(content),
        last_modified=record.created_at,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _view(record: ArtifactRecord) -> dict[str, Any]:
    rank = record.metadata["lora_rank"]
    checkpoint = Checkpoint(
        id=record.artifact_id,
        run_id=record.run_id,
        checkpoint_id=record.name or "",
        created_at=record.created_at,
        base_model=record.metadata["base_model"],
        lora_adapter_config=LoraAdapterConfig(rank=rank),
        size_bytes=record.size_bytes,
        target="trainer" if record.kind == WEIGHTS else "sampler",
        expires_at=record.expires_at,
    )
    return {**checkpoint.to_dict(), "lora_adapter_config": {"rank": rank, "r": rank}}  # Loops clients call it "r"
