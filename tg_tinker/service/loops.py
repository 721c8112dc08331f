"""What a ``ServiceClient`` offers of the Loops surface: trainers, checkpoints, and here samplers and capabilities."""

from __future__ import annotations

from functools import partial

from tg_tinker.core.call import Call, Flow, call
from tg_tinker.faces import blocking, twin
from tg_tinker.loops import plane
from tg_tinker.loops.waits import Waits
from tg_tinker.sampling import SamplingClient
from tg_tinker.service.checkpoints import CheckpointService
from tg_tinker.service.keywords import suggesting
from tg_tinker.service.trainers import Scope, TrainerService, one_replica, scope_of
from tg_tinker.types import arguments, checks
from tg_tinker.types.loops_results import ServerCapabilities
from tg_tinker.wire import loops

__all__ = ["LoopsService"]


class LoopsService(TrainerService, CheckpointService):
    """The Loops half of ``ServiceClient``."""

    @blocking
    @suggesting
    def create_sampling_client(
        self,
        base_model: str | None = None,
        timeout: float | None = None,
        ready_timeout: float | None = None,
        model_path: str | None = None,
        max_seq_len: int | None = None,
        num_replicas: int | None = None,
        scope: Scope | None = None,
    ) -> Flow[SamplingClient]:
        """Return a sampler of a base model alone, or of a ``bt://loops:<run_id>/sampler_weights/<name>`` checkpoint.

        ``timeout`` bounds the silence on one request, ``ready_timeout`` the creation, in seconds; None is the
        service's own.

        Raises ``InvalidRequestError`` unless exactly one of ``base_model`` and ``model_path`` is given, and for a
        state's path, ``ResourceNotFoundError`` where there is no such model or checkpoint, ``FutureTimeoutError`` where
        it takes too long.
        """
        if (base_model is None) == (model_path is None):
            raise checks.refuse("base_model", "exactly one of base_model and model_path", base_model)
        one_replica("num_replicas", 1 if num_replicas is None else num_replicas)
        request = loops.SamplerRequest(
            base_model=arguments.optional_text("base_model", base_model),
            model_path=None if model_path is None else plane.sampler_path(model_path),
            max_seq_length=None if max_seq_len is None else arguments.whole("max_seq_len", max_seq_len, 1),
            scope=scope_of(scope),
        )
        waits = Waits.given(self.config, ready_timeout=ready_timeout, sampler_timeout=timeout)
        return Flow(operation="create_sampling_client", steps=partial(self._open_sampler, request, waits))

    create_sampling_client_async = twin(create_sampling_client)

    async def _open_sampler(self, request: loops.SamplerRequest, waits: Waits) -> SamplingClient:
        what = f"a sampler of {request.base_model or request.model_path}"
        self._report("load", what)
        async with waits.creating(what):
            sampler = await self._provider.open_sampler(self.core, request, waits.ready)
        made = SamplingClient(
            self.core.service,
            sampler,
            self._tokenizers,
            timeout=waits.sampler,
            ready_timeout=waits.ready,
            pinned=plane.pinned_to(request.model_path),
        )
        self._report("ready", f"sampler {sampler.id} of {sampler.base_model}")
        return made

    @blocking
    def get_server_capabilities(self) -> Call[ServerCapabilities]:
        """Say what the server offers: models at hand, losses, wire extensions."""
        return call(loops.CAPABILITIES)

    get_server_capabilities_async = twin(get_server_capabilities)
