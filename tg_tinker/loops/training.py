"""The Loops ``TrainingClient``: one live trainer, operation by operation.

Each operation is written once, as a plan that checks and encodes on the caller's thread; ``faces`` publishes it.
Made by ``ServiceClient.create_lora_training_client``. The TG client of the same name is in ``tg_tinker``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Unpack, final

import attrs

from tg_tinker.core.call import Call, Composed, Flow, Options, call
from tg_tinker.core.lane import Place
from tg_tinker.core.retrieval import LoopsRetrieval
from tg_tinker.core.run import RunCore
from tg_tinker.core.service import ServiceCore
from tg_tinker.faces import blocking, composed, composed_twin, operation, twin
from tg_tinker.loops import custom, plane
from tg_tinker.loops.checkpoints import RunCheckpoints
from tg_tinker.loops.custom import CustomLoss
from tg_tinker.loops.paired import PairedSampler
from tg_tinker.loops.provider import Provider
from tg_tinker.loops.tracking import Progress, Tracker, tracker_of
from tg_tinker.loops.waits import Waits
from tg_tinker.sampling import SamplingClient
from tg_tinker.tokenizer import Tokenizers
from tg_tinker.types import arguments, checks, losses
from tg_tinker.types.arguments import MOST_SECONDS
from tg_tinker.types.loops import AdamParams, Datum, LossName, datums
from tg_tinker.types.loops_results import (
    ForwardBackwardOutput,
    GetInfoResponse,
    InitTrainerServerResponse,
    LoadWeightsResponse,
    ModelData,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from tg_tinker.wire import codec, headers, loops
from tg_tinker.wire.route import Route

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TrainingClient"]

R = TypeVar("R")
_MOST_RANK = 512


@final
class TrainingClient(RunCheckpoints):
    """A run of the Loops surface: passes, optimizer steps, checkpoints, published weights.

    Operations take effect in the order in which they were called, whatever thread, loop or face they were called from.
    """

    def __init__(
        self,
        service: ServiceCore,
        run: loops.Run,
        tokenizers: Tokenizers,
        provider: Provider,
        *,
        waits: Waits,
        lora_rank: int | None,
        max_seq_len: int | None = None,
    ) -> None:
        core = RunCore(service, LoopsRetrieval(run.base_url), name=f"run {run.id}", headers={headers.RUN_ID: run.id})
        super().__init__(core, run)
        self._tokenizers = tokenizers
        self._rank = lora_rank
        self._max_seq_len = run.max_seq_len or max_seq_len
        self._waits = waits
        self._paired = PairedSampler(self._core, run, tokenizers, provider, waits=waits)
        self._progress: Progress | None = None

    def __repr__(self) -> str:
        """Run, model, rank."""
        return f"<loops.TrainingClient {self._run.id}: {self._run.base_model}, rank {self._rank or 'unknown'}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what to pass instead."""
        raise TypeError(
            "a TrainingClient cannot be pickled: pass client.run_id, and call service.attach(run_id) over there"
        )

    def track(self, tracker: Tracker) -> None:
        """Tell a tracker of every optimizer step from the next one on; closing this client finishes the tracker.

        Raises ``InvalidRequestError`` where it is none, or there is one already.
        """
        if self._progress is not None or tracker_of(None, tracker) is None:
            raise checks.refuse("tracker", "one tracker of a client, with log(metrics, step) and finish()", tracker)
        self._progress = Progress(tracker)
        self._core.at_close.append(self._progress.finish)

    # -------------------------------------------------------------------------------------------- training

    @operation
    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossName = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> Call[ForwardBackwardOutput]:
        """Run ``data`` forward and backward with a loss; gradients add up until ``optim_step``.

        Raises ``InvalidRequestError`` naming datum and tensor, the loss, or the config key.
        """
        made = self._pass(loops.FORWARD_BACKWARD, data, loss_fn, loss_fn_config, adds_gradient=True)
        told = None if self._progress is None else self._progress.expect_pass()
        return made if told is None else attrs.evolve(made, on_result=told, eager=True)

    forward_backward_async = twin(forward_backward)

    @operation
    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossName = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> Call[ForwardBackwardOutput]:
        """Run ``data`` forward with a loss; accumulated gradients are left untouched.

        Raises ``InvalidRequestError`` naming datum and tensor, the loss, or the config key.
        """
        return self._pass(loops.FORWARD, data, loss_fn, loss_fn_config)

    forward_async = twin(forward)

    @composed
    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, loss_type_input: str = "logprobs"
    ) -> Composed[ForwardBackwardOutput]:
        """Run ``data`` forward, compute a loss of your own from its logprobs, and accumulate that loss's gradients.

        ``loss_fn(data, logprobs)`` gets one array of log probabilities per datum, aligned with its ``target_tokens``.
        As "logprobs" these are torch tensors that require gradients, and it returns ``(loss, metrics)``; as "numpy"
        they are numpy arrays, and it returns ``(loss, gradients, metrics)``. It runs in a worker thread and must not
        call this client.

        Raises ``InvalidRequestError`` naming the field; what ``loss_fn`` raises comes out of the future.
        """
        checked = custom.check(data, loss_fn, loss_type_input)
        first = self._pass(loops.FORWARD, custom.for_forward(checked), "cross_entropy", custom.SUMMED)
        told = None if self._progress is None else self._progress.expect_pass()
        return Composed(
            first=first,
            then=partial(self._custom_backward, checked, loss_fn, loss_type_input, told),
            operation="forward_backward_custom",
            keeps_a_place=True,
        )

    forward_backward_custom_async = twin(forward_backward_custom)

    async def _custom_backward(
        self,
        data: tuple[Datum, ...],
        loss_fn: CustomLoss,
        kind: str,
        told: Callable[[ForwardBackwardOutput], None] | None,
        seen: ForwardBackwardOutput,
        place: Place,
    ) -> ForwardBackwardOutput:
        weighted, loss, metrics = await custom.evaluate(data, loss_fn, kind, seen)
        second = self._pass(loops.FORWARD_BACKWARD, weighted, "cross_entropy", custom.SUMMED, adds_gradient=True)
        output = custom.merged(await self._core.start(second, place), loss, metrics)
        if told is not None:
            told(output)
        return output

    @operation
    def optim_step(self, adam_params: AdamParams) -> Call[OptimStepResponse]:
        """Apply the accumulated gradients with AdamW, and clear them.

        Raises ``InvalidRequestError`` where there are none.
        """
        if not isinstance(adam_params, AdamParams):
            raise checks.refuse("adam_params", "an AdamParams", adam_params)
        made = self._submit(loops.OPTIM_STEP, loops.OptimStepRequest(adam_params=adam_params), applies_gradient=True)
        told = None if self._progress is None else self._progress.expect_step()
        return made if told is None else attrs.evolve(made, on_result=told, eager=True)

    optim_step_async = twin(optim_step)

    @operation
    def init_trainer_server(self, lora_rank: int) -> Call[InitTrainerServerResponse]:
        """Start a fresh adapter of ``lora_rank`` on this trainer, at step 0."""
        return self.init_call(arguments.whole("lora_rank", lora_rank, 1, _MOST_RANK))

    init_trainer_server_async = twin(init_trainer_server)

    def init_call(self, lora_rank: int) -> Call[InitTrainerServerResponse]:
        """The call behind ``init_trainer_server``, for the service that sets a trainer up."""
        body = loops.InitTrainerServerRequest(lora_rank=lora_rank, base_model=self._run.base_model)
        return self._submit(loops.INIT_TRAINER_SERVER, body, on_result=self._note_rank)

    def _note_rank(self, answer: InitTrainerServerResponse) -> None:
        self._rank = answer.lora_rank

    # ----------------------------------------------------------------------------------------- checkpoints

    @operation
    def save_state(self, name: str, ttl_seconds: int | None = None) -> Call[SaveWeightsResponse]:
        """Save a checkpoint of weights and optimizer under ``name``; it is deleted after ``ttl_seconds``."""
        body = loops.SaveStateRequest(name=arguments.text("name", name), ttl_seconds=_ttl(ttl_seconds))
        return self._submit(loops.SAVE_STATE, body)

    save_state_async = twin(save_state)

    @operation
    def load_state(self, path: str) -> Call[LoadWeightsResponse]:
        """Load the weights of a ``bt://loops:<run_id>/weights/<name>`` checkpoint; the optimizer starts afresh."""
        return self.load_call(path, with_optimizer=False)

    load_state_async = twin(load_state)

    @operation
    def load_state_with_optimizer(self, path: str) -> Call[LoadWeightsResponse]:
        """Load weights and optimizer of a checkpoint: training resumes bit for bit."""
        return self.load_call(path, with_optimizer=True)

    load_state_with_optimizer_async = twin(load_state_with_optimizer)

    def load_call(self, path: str, *, with_optimizer: bool) -> Call[LoadWeightsResponse]:
        """The call behind both kinds of ``load_state``, for the service that makes a client from a state."""
        route = loops.LOAD_STATE_WITH_OPTIMIZER if with_optimizer else loops.LOAD_STATE
        return self._submit(route, loops.LoadStateRequest(path=plane.checkpoint_path(path)))

    # ------------------------------------------------------------------------------------------- samplers

    @operation
    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None
    ) -> Call[SaveWeightsForSamplerResponse]:
        """Publish the weights to the paired sampler under ``name``, as a new version that never changes."""
        body = loops.SaveWeightsForSamplerRequest(name=arguments.text("name", name), ttl_seconds=_ttl(ttl_seconds))
        return self._submit(loops.SAVE_WEIGHTS_FOR_SAMPLER, body)

    save_weights_for_sampler_async = twin(save_weights_for_sampler)

    @composed
    def save_weights_and_get_sampling_client(self, name: str = "default") -> Composed[SamplingClient]:
        """Publish the weights under ``name``, and give a client pinned to that version once a sampler serves it.

        Raises ``SamplerNotReadyError`` where none does within 600 s of the publish, whatever timeout ``result`` is
        given.
        """
        body = loops.SaveWeightsForSamplerRequest(name=arguments.text("name", name), bump_version=True)
        first = self._submit(loops.SAVE_WEIGHTS_FOR_SAMPLER, body, eager=True)
        return Composed(first=first, then=self._paired.at_version, operation="save_weights_and_get_sampling_client")

    save_weights_and_get_sampling_client_async = composed_twin(save_weights_and_get_sampling_client)

    @blocking
    def create_sampling_client(self, model_path: str) -> Flow[SamplingClient]:
        """Return a client of the paired sampler for a ``bt://loops:<run_id>/sampler_weights/<name>`` checkpoint.

        Raises ``InvalidRequestError`` for a state, which does not serve sampling, ``ResourceNotFoundError`` where there
        is no such checkpoint.
        """
        path = plane.sampler_path(model_path)
        return Flow(operation="create_sampling_client", steps=partial(self._paired.at_checkpoint, path))

    create_sampling_client_async = twin(create_sampling_client)

    # ------------------------------------------------------------------------------------------- the rest

    @blocking
    def get_tokenizer(self) -> Flow[PreTrainedTokenizerBase]:
        """Return the base model's tokenizer, as the server serves it; cached after the first time."""
        return Flow(operation="get_tokenizer", steps=partial(self._tokenizers.get, self._core, self._run.base_model))

    get_tokenizer_async = twin(get_tokenizer)

    def get_info(self) -> GetInfoResponse:
        """Describe the run: base model, LoRA rank, longest sequence in tokens; no round trip."""
        model = self._run.base_model
        return GetInfoResponse(
            model_data=ModelData(model_name=model, tokenizer_id=model),
            model_name=model,
            is_lora=True,
            lora_rank=self._rank,
            max_seq_len=self._max_seq_len,
        )

    @property
    def policy_version(self) -> int:
        """Optimizer steps applied so far; each access is a round trip. In coroutines use ``policy_version_async``."""
        return self._policy_version()

    @blocking
    def _policy_version(self) -> Call[int]:
        """Ask the trainer for the number of optimizer steps applied so far."""
        return call(loops.POLICY_VERSION, base=self._run.base_url, decode=_steps, timeout=self._waits.trainer)

    policy_version_async = twin(_policy_version, name="policy_version_async")

    @blocking
    def health(self) -> Call[None]:
        """Check that the trainer answers. Raises ``ServerUnreachableError`` or ``ServerError`` where it does not."""
        return call(
            loops.HEALTH,
            base=self._run.base_url,
            query={"base_model": self._run.base_model},
            decode=_nothing,
            whole_reply=True,
            timeout=self._waits.trainer,
        )

    health_async = twin(health)

    # -------------------------------------------------------------------------------------- how it is done

    async def open_sampler(self) -> None:
        """Open the paired sampler now rather than with the first publish; runs at home, for the service."""
        await self._paired.open()

    def _pass(
        self,
        route: Route[ForwardBackwardOutput],
        data: Sequence[Datum],
        loss_fn: str,
        config: Mapping[str, float] | None,
        **options: Unpack[Options],
    ) -> Call[ForwardBackwardOutput]:
        checked = datums(data)
        losses.settings(loss_fn, config)
        losses.require_inputs(loss_fn, checked)
        body = loops.PassRequest(data=checked, loss_fn=loss_fn, loss_fn_config=None if config is None else dict(config))
        return self._submit(route, body, **options)

    def _submit(self, route: Route[R], request: object, **options: Unpack[Options]) -> Call[R]:
        body = {**plane.fields(request), "run_id": self._run.id, "model": self._run.base_model}
        options |= {"sequenced": True, "timeout": self._waits.trainer}
        return call(route, body, base=self._run.base_url, **options)


def _ttl(value: object) -> int | None:
    return None if value is None else arguments.whole("ttl_seconds", value, 1, MOST_SECONDS)


def _steps(data: Any) -> int:
    return codec.decode(loops.PolicyVersion, data).policy_version


def _nothing(_: object) -> None:
    """What a healthy trainer says."""
