"""The TG wire's artifacts, audit log and privacy reports."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tg_tinker.errors import TGTinkerError
from tg_tinker.server.api import common, query
from tg_tinker.server.middleware import event_id
from tg_tinker.wire import tg

if TYPE_CHECKING:
    from tg_tinker.store.checkpoints import ArtifactRecord


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.get(tg.PRIVACY.path, privacy),
        web.get(tg.ARTIFACTS.path, list_artifacts),
        web.delete(tg.ARTIFACT.path, delete_artifact),
        web.get(tg.ARTIFACT_CONTENT.path, pull_artifact),
        web.get(tg.AUDIT_LOGS.path, audit_logs),
        web.get(tg.AUDIT_HEAD.path, audit_head),
    ]


async def privacy(request: web.Request) -> web.Response:
    """What the run has spent, and what is left."""
    run = await common.run_of(request, request.match_info["id"])
    return common.reply(await common.rooms_of(request).scheduler.call(run.privacy_report))


async def list_artifacts(request: web.Request) -> web.Response:
    """The tenant's artifacts, newest first."""
    query.only(request, "training_client_id", "limit")
    limit = query.limit(request)
    store, client = common.rooms_of(request).store, request.query.get("training_client_id")
    records = await asyncio.to_thread(store.list, common.tenant_of(request), client)
    return common.reply([_listed(record) for record in reversed(records)][:limit])


async def delete_artifact(request: web.Request) -> web.Response:
    """Remove an artifact for good."""
    rooms, tenant, artifact_id = common.rooms_of(request), common.tenant_of(request), request.match_info["id"]
    await asyncio.to_thread(rooms.store.delete, tenant, artifact_id)
    await rooms.auditing.happened(tenant, "delete_artifact", event_id(request), artifact_ids_consumed=(artifact_id,))
    return common.reply({"artifact_id": artifact_id, "deleted": True})


async def pull_artifact(request: web.Request) -> web.Response:
    """The sealed bytes, which open anywhere with the tenant's key; they leave when that is on record."""
    rooms, tenant, artifact_id = common.rooms_of(request), common.tenant_of(request), request.match_info["id"]
    record = await asyncio.to_thread(rooms.store.get, tenant, artifact_id)
    pulled = partial(rooms.auditing.happened, tenant, "pull_artifact", event_id(request))
    told: dict[str, Any] = {"training_client_id": record.run_id, "artifact_ids_consumed": (artifact_id,)}
    try:
        content = await asyncio.to_thread(rooms.store.pull, tenant, artifact_id)
    except TGTinkerError as error:
        await pulled(error, **told)
        raise
    await pulled(**told)
    return web.Response(body=content, content_type="application/octet-stream", headers=_described(record))


async def audit_logs(request: web.Request) -> web.Response:
    """Entries of the tenant's chain, in its order."""
    query.only(request, "training_client_id", "operation", "start_time", "end_time", "limit", "offset")
    auditing = common.rooms_of(request).auditing
    asked: dict[str, Any] = {
        "training_client_id": request.query.get("training_client_id"),
        "operation": request.query.get("operation"),
        "start_time": query.time(request, "start_time"),
        "end_time": query.time(request, "end_time"),
        "limit": query.limit(request),
        "offset": query.whole(request, "offset", 0),
    }
    await auditing.flush()
    return common.reply(await auditing.log.entries(common.tenant_of(request), **asked))


async def audit_head(request: web.Request) -> web.Response:
    """The length and last hash of the tenant's chain, signed."""
    auditing = common.rooms_of(request).auditing
    await auditing.flush()
    return common.reply((await auditing.log.head(common.tenant_of(request))).to_dict())


def _described(record: ArtifactRecord) -> dict[str, str]:
    return {
        "Content-Disposition": f'attachment; filename="{record.artifact_id}.tgart"',
        "X-Encryption-Algorithm": record.encryption.algorithm,
        "X-Encryption-Key-Id": record.encryption.key_id,
        "Cache-Control": "no-store",
    }


def _listed(record: ArtifactRecord) -> dict[str, Any]:
    return {
        "artifact_id": record.artifact_id,
        "training_client_id": record.run_id,
        "kind": record.kind,
        "name": record.name,
        "step": record.step,
        "size_bytes": record.size_bytes,
        "encryption": record.encryption,
        "metadata": record.metadata,
        "privacy": record.privacy,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
    }
