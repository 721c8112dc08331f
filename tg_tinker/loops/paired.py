"""The sampler that is paired with a trainer: opened once, then clients of its versions and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from tg_tinker.core.compose import wait_for_version
from tg_tinker.core.run import RunCore
from tg_tinker.loops import plane
from tg_tinker.loops.provider import Provider
from tg_tinker.loops.waits import Waits
from tg_tinker.sampling import SamplingClient
from tg_tinker.tokenizer import Tokenizers
from tg_tinker.types.loops_results import SaveWeightsForSamplerResponse
from tg_tinker.wire import headers, loops

__all__ = ["PairedSampler"]


class PairedSampler:
    """Makes the sampling clients of one run; every coroutine runs at home."""

    def __init__(
        self,
        core: RunCore,
        run: loops.Run,
        tokenizers: Tokenizers,
        provider: Provider,
        *,
        waits: Waits,
    ) -> None:
        self._core = core
        self._run = run
        self._tokenizers = tokenizers
        self._provider = provider
        self._waits = waits
        self._sampler: loops.Sampler | None = None

    async def at_version(self, published: SaveWeightsForSamplerResponse) -> SamplingClient:
        """A client pinned to a version that was just published, once it is served; exactly, where that is offered."""
        sampler, version, exact = await self.open(), published.version, False

        async def serving(hold: float) -> int:
            nonlocal exact
            served, exact = await plane.served_version(self._core, sampler.base_url, version, hold)
            return served

        await wait_for_version(serving, version)
        pin = {headers.MIN_POLICY_VERSION: str(version)} if version else {}
        return self._client(sampler, pin | ({headers.EXACT_POLICY_VERSION: str(version)} if exact else {}))

    async def at_checkpoint(self, path: str) -> SamplingClient:
        """A client of a checkpoint. Raises ``ResourceNotFoundError`` where there is none at ``path``."""
        sampler = await self.open()
        await self._provider.check_checkpoint(self._core, path, self._run.id)
        return self._client(sampler, plane.pinned_to(path))

    async def open(self) -> loops.Sampler:
        """The sampler, which is asked for once."""
        if self._sampler is None:
            request = loops.SamplerRequest(session_id=self._run.session_id, run_id=self._run.id)
            found = await self._provider.open_sampler(self._core, request, self._waits.ready)
            self._sampler = attrs.evolve(found, base_model=self._run.base_model)
        return self._sampler

    def _client(self, sampler: loops.Sampler, pinned: Mapping[str, str]) -> SamplingClient:
        return SamplingClient(
            self._core.service,
            sampler,
            self._tokenizers,
            timeout=self._waits.sampler,
            ready_timeout=self._waits.ready,
            pinned=pinned,
            run_id=self._run.id,
        )
