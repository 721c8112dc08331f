"""What answers without a key, and what every surface shares: health, tokenizers."""

from __future__ import annotations

import asyncio
import importlib.metadata
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import web

from tg_tinker.errors import ServerError
from tg_tinker.server.api import common
from tg_tinker.server.middleware import error_response
from tg_tinker.types import checks
from tg_tinker.wire import headers, tg


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.get(tg.HEALTH.path, health),
        web.get("/readyz", ready),
        web.get("/metrics", metrics),
        web.get("/v1/health", health),
        web.get(tg.TOKENIZER.path, tokenizer),
    ]


async def health(_: web.Request) -> web.Response:
    """It answers."""
    version = importlib.metadata.version("tg-tinker")
    return common.reply(tg.Health(status="healthy", version=version, extensions=headers.OFFERED))


async def ready(request: web.Request) -> web.Response:
    """It answers, and the engine is imported: the next request waits for a model at most."""
    if common.rooms_of(request).warming.is_alive():
        return error_response(request, ServerError("the engine is being imported", code="STARTING"), 503)
    return await health(request)


async def metrics(request: web.Request) -> web.Response:
    """Numbers of this process, in the Prometheus text format; nothing about any tenant."""
    rooms = common.rooms_of(request)
    statuses = Counter(ticket.status for ticket in rooms.tickets)
    lines = [f'tg_tinker_operations{{status="{status}"}} {count}' for status, count in sorted(statuses.items())]
    lines += [f"tg_tinker_runs {len(list(rooms.runs))}", f"tg_tinker_models {len(rooms.models.loaded())}"]
    return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


async def tokenizer(request: web.Request) -> web.Response:
    """The files of a model's tokenizer, so that a client without the model can encode."""
    ref = request.query.get("model")
    if not ref:
        raise checks.refuse("model", "the name of a model", ref)
    model = await common.rooms_of(request).models.any(ref)
    files = await asyncio.to_thread(_files, model.base.tokenizer)
    return common.reply(tg.TokenizerFiles(model=ref, files=files))


def _files(saved: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="tg-tinker-") as folder:
        saved.save_pretrained(folder)
        return {
            path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir()) if path.is_file()
        }
