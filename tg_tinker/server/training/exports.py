"""Checkpoints as plain files, for download: a peft folder, and for a training state what resuming needs beside it.

Files are made in memory of a verified artifact. Each is fetched by a signed URL that expires; nothing else opens them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import tempfile
from collections import OrderedDict
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import AuthorizationError, ResourceNotFoundError

if TYPE_CHECKING:
    from tg_tinker.store.checkpoints import CheckpointStore, Loaded

LIFETIME = 900.0  # seconds that a signed URL works
KEPT = 4  # checkpoints whose files stay in memory for the requests that follow

Files = dict[str, bytes]


@attrs.frozen
class Grant:
    """What a signed URL allows: one tenant's artifact, one file of it, until a time (seconds since 1970)."""

    tenant: str
    artifact_id: str
    file: str
    expires: float


class Exports:
    """Makes, signs and serves the files of checkpoints."""

    def __init__(self, store: CheckpointStore, key: bytes) -> None:
        self._store = store
        self._key = key
        self._made: OrderedDict[tuple[str, str], asyncio.Task[Files]] = OrderedDict()

    async def files(self, tenant: str, artifact_id: str) -> Files:
        """Every file of a checkpoint, by its relative name."""
        await asyncio.to_thread(self._store.get, tenant, artifact_id)  # it may have been deleted meanwhile
        task = self._made.get((tenant, artifact_id))
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(asyncio.to_thread(self._make, tenant, artifact_id), name="export")
            self._made[tenant, artifact_id] = task
        self._made.move_to_end((tenant, artifact_id))
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        return await asyncio.shield(task)

    def sign(self, tenant: str, artifact_id: str, file: str) -> str:
        """A token for one file."""
        grant = Grant(tenant, artifact_id, file, time() + LIFETIME)
        content = base64.urlsafe_b64encode(json.dumps(attrs.astuple(grant)).encode()).decode().rstrip("=")
        return f"{content}.{self._signature(content)}"

    def verify(self, token: str, file: str) -> Grant:
        """What a token allows.

        Raises ``AuthorizationError`` for one that is forged, expired, or for another file.
        """
        content, _, signature = token.partition(".")
        if not hmac.compare_digest(self._signature(content).encode(), signature.encode()):
            raise AuthorizationError("the URL's signature is not valid")
        grant = Grant(*json.loads(base64.urlsafe_b64decode(content + "=" * (-len(content) % 4))))
        if grant.expires < time() or grant.file != file:
            raise AuthorizationError("the URL has expired; ask for a new one")
        return grant

    async def content(self, grant: Grant) -> bytes:
        """The file that a token was for.

        Raises ``ResourceNotFoundError`` where the checkpoint is gone.
        """
        content = (await self.files(grant.tenant, grant.artifact_id)).get(grant.file)
        if content is None:
            raise ResourceNotFoundError("no such file", resource_type="file", resource_id=grant.file)
        return content

    def _signature(self, content: str) -> str:
        return hmac.digest(self._key, content.encode(), hashlib.sha256).hex()

    def _make(self, tenant: str, artifact_id: str) -> Files:
        loaded = self._store.load(tenant, artifact_id)
        made = _peft(loaded)
        rest = {name: tensor for name, tensor in loaded.tensors.items() if not name.startswith("base_model.")}
        if loaded.record.kind != "sampler_weights":
            import safetensors.torch

            made["trainer/state.safetensors"] = safetensors.torch.save(rest, {"format": "pt"})
            made["trainer/counters.json"] = json.dumps(loaded.counters, indent=2, sort_keys=True).encode()
        return made


def _peft(loaded: Loaded) -> Files:
    from tg_tinker.store.peft_export import export_peft

    spec: dict[str, Any] = loaded.counters["spec"]
    with tempfile.TemporaryDirectory(prefix="tg-tinker-") as folder:
        export_peft(
            Path(folder),
            loaded.tensors,
            base_model=loaded.counters["server"]["base_model"],
            rank=spec["rank"],
            alpha=spec["alpha"],
            dropout=spec["dropout"],
            target_modules=spec["target_modules"],
        )
        return {f"adapter/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}
