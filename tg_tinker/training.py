"""The TG ``TrainingClient``: one training run on a server, operation by operation.

Each operation is written once, as a plan that checks and encodes on the caller's thread; ``faces`` publishes it.
Made by ``ServiceClient.create_training_client``. The Loops client of the same name is in ``tg_tinker.loops``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar, Unpack, final

import attrs

from tg_tinker.core.call import Call, Flow, Options, call
from tg_tinker.core.run import RunCore
from tg_tinker.errors import InvalidRequestError
from tg_tinker.faces import blocking, operation, stream, stream_twin, twin
from tg_tinker.failure import Failure
from tg_tinker.tokenizer import Tokenizers
from tg_tinker.types import arguments, checks
from tg_tinker.types.batch import BatchData
from tg_tinker.types.config import TrainingConfig
from tg_tinker.types.results import (
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepResult,
    PrivacyReport,
    SampleResult,
    SaveStateResult,
    StreamChunk,
    TrainingClientInfo,
)
from tg_tinker.wire import codec, tg
from tg_tinker.wire.json_object import json_object
from tg_tinker.wire.route import Route

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StreamOptions", "TrainingClient"]

R = TypeVar("R")
_STATUSES = {tg.RUN_COMPLETED: "completed", tg.RUN_FAILED: "failed"}


class StreamOptions(TypedDict, total=False):
    """What ``sample_stream`` takes beside prompt, ``max_tokens`` and ``temperature``; as in ``sample``."""

    top_p: float
    top_k: int | None
    stop_sequences: list[str] | None
    num_completions: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None


@final
class TrainingClient:
    """A run of the TG surface: forward_backward and optim_step, sampling, sealed checkpoints.

    Operations take effect in the order in which they were called, whatever thread, loop or face they were called from.
    ``step`` and ``status`` follow what becomes of the operations, good or bad; ``refresh`` asks the server.
    """

    def __init__(self, core: RunCore, info: TrainingClientInfo, tokenizers: Tokenizers) -> None:
        self._core = core
        self._tokenizers = tokenizers
        self._mode = "train"
        self._calls = 0  # numbers the calls
        self._seen = -1  # the last one whose end said something of step or status
        self._id = info.training_client_id
        self._config = _config_of(info)
        self._step = info.step
        self._status = info.status

    def __repr__(self) -> str:
        """Id, step, status, and the mode where it is not the usual one."""
        mode = ", eval" if self._mode == "eval" else ""
        return f"<TrainingClient {self._id}: step {self._step}, {self._status}{mode}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what to pass instead."""
        raise TypeError(
            "a TrainingClient cannot be pickled: pass tc.id, and call service.get_training_client(id) over there"
        )

    # ------------------------------------------------------------------------------------------ what it is

    @property
    def core(self) -> RunCore:
        """Where its calls go."""
        return self._core

    @property
    def id(self) -> str:
        """Unique identifier of this training client."""
        return self._id

    @property
    def step(self) -> int:
        """Optimizer steps applied so far, as the newest result says."""
        return self._step

    @property
    def config(self) -> TrainingConfig:
        """The training configuration."""
        return self._config

    @property
    def status(self) -> str:
        """Current status: "active", "completed" (``max_steps`` reached) or "failed"."""
        return self._status

    # -------------------------------------------------------------------------------------------- training

    def train(self) -> None:
        """Set training mode for the calls that follow."""
        self._mode = "train"

    def eval(self) -> None:
        """Set evaluation mode for the calls that follow: ``forward_backward`` computes the loss and nothing else."""
        self._mode = "eval"

    @operation
    def forward_backward(
        self, batch: BatchData | Mapping[str, Any], batch_hash: str | None = None
    ) -> Call[ForwardBackwardResult]:
        """Run a batch forward and backward; gradients add up until ``optim_step``.

        ``batch`` has ``input_ids`` and perhaps ``attention_mask`` and ``labels``, ``(rows, positions)`` each. A
        ``batch_hash`` (see ``tg_tinker.batch_hash``) is verified. In evaluation mode the loss alone is computed.

        Raises ``InvalidRequestError`` naming the field.
        """
        if batch_hash is not None and not isinstance(batch_hash, str):
            raise checks.refuse("batch_hash", "a string such as 'sha256:...', or None", batch_hash)
        training = self._mode == "train"
        body = tg.ForwardBackwardRequest(
            batch=BatchData.of(batch), batch_hash=batch_hash, mode="train" if training else "eval"
        )
        return self._call(tg.FORWARD_BACKWARD, body, adds_gradient=training)

    forward_backward_async = twin(forward_backward)

    @operation
    def optim_step(self, apply_dp_noise: bool = True) -> Call[OptimStepResult]:
        """Apply the accumulated gradients with the run's optimizer, and clear them.

        ``apply_dp_noise=False`` takes a step without noise on a run with differential privacy; its guarantee ends with
        that.

        Raises ``InvalidRequestError`` in evaluation mode and where there are no gradients, ``DPBudgetExceededError``
        where the step would spend more privacy than the budget allows.
        """
        if not isinstance(apply_dp_noise, bool):
            raise checks.refuse("apply_dp_noise", "True or False", apply_dp_noise)
        if self._mode == "eval":
            message = "mode: optim_step needs train mode; call train() first"
            raise InvalidRequestError(message, field="mode", constraint="train mode")
        body = tg.OptimStepRequest(apply_dp_noise=apply_dp_noise)
        return self._call(tg.OPTIM_STEP, body, moves=True, applies_gradient=True)

    optim_step_async = twin(optim_step)

    # -------------------------------------------------------------------------------------------- sampling

    @blocking
    def sample(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop_sequences: Sequence[str] | None = None,
        num_completions: int = 1,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        *,
        seed: int | None = None,
    ) -> Call[SampleResult]:
        """Generate ``num_completions`` completions of each prompt, with the weights of this place in the order.

        Prompts are taken raw, without a chat template. ``temperature`` 0 is greedy; ``top_k`` None or 0 is off;
        ``seed`` None draws one. Stop text is not part of a completion. The repetition penalty counts prompt and
        completion, presence and frequency the completion alone.

        Raises ``InvalidRequestError`` naming the field.
        """
        body = tg.SampleRequest(
            prompts=arguments.texts("prompts", prompts),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_sequences=stop_sequences,
            num_completions=num_completions,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        return self._call(tg.SAMPLE, body)

    sample_async = twin(sample)

    @stream
    def sample_stream(
        self, prompts: str, max_tokens: int = 128, temperature: float = 1.0, **kwargs: Unpack[StreamOptions]
    ) -> Call[StreamChunk]:
        """Generate as ``sample`` does, and yield each piece of text as soon as it is certain.

        ``prompts`` is a single string; the other arguments of ``sample`` are taken by keyword. The texts concatenate to
        the completion of ``sample`` at the same seed. Leaving the iterator early stops the generation.

        Raises ``InvalidRequestError`` naming the field.
        """
        if not isinstance(prompts, str):
            raise checks.refuse("prompts", "a single string (sample takes several)", prompts)
        known = ("prompts", "max_tokens", "temperature", *StreamOptions.__annotations__)
        checks.refuse_others(kwargs, known, "no argument of sample_stream")
        body = tg.SampleRequest(
            prompts=arguments.texts("prompts", prompts), max_tokens=max_tokens, temperature=temperature, **kwargs
        )
        return self._call(tg.SAMPLE_STREAM, body)

    sample_stream_async = stream_twin(sample_stream)

    # ----------------------------------------------------------------------------------------- checkpoints

    @blocking
    def save_state(
        self, include_optimizer: bool = True, metadata: Mapping[str, Any] | None = None
    ) -> Call[SaveStateResult]:
        """Save the run's state, sealed; it is durable when this returns.

        ``metadata`` is any JSON object; ``load_state`` gives it back.

        Raises ``InvalidRequestError`` naming the field.
        """
        if not isinstance(include_optimizer, bool):
            raise checks.refuse(
                "include_optimizer", "True or False (states have no names; use metadata)", include_optimizer
            )
        body = tg.SaveStateRequest(include_optimizer=include_optimizer, metadata=json_object("metadata", metadata))
        return self._call(tg.SAVE_STATE, body)

    save_state_async = twin(save_state)

    @blocking
    def load_state(self, artifact_id: str) -> Call[LoadStateResult]:
        """Restore a saved state into this run: weights, optimizer, step, schedule, random state.

        ``exact`` of the result says whether training resumes bit for bit, ``reasons`` why not.

        Raises ``ResourceNotFoundError`` where there is no such artifact, ``InvalidRequestError`` where it does not fit
        the run.
        """
        if not isinstance(artifact_id, str) or not artifact_id:
            raise checks.refuse("artifact_id", "the artifact_id of a saved state", artifact_id)
        body = tg.LoadStateRequest(artifact_id=artifact_id)
        return self._call(tg.LOAD_STATE, body, moves=True)

    load_state_async = twin(load_state)

    # ------------------------------------------------------------------------------------------- the rest

    @blocking
    def get_tokenizer(self) -> Flow[PreTrainedTokenizerBase]:
        """Return the model's tokenizer, as the server serves it; cached after the first time."""
        return Flow(operation="get_tokenizer", steps=partial(self._tokenizers.get, self._core, self._config.model_ref))

    get_tokenizer_async = twin(get_tokenizer)

    @blocking
    def get_privacy_report(self) -> Call[PrivacyReport]:
        """Return the run's privacy ledger: what was spent, what is left, and by which assumptions."""
        return self._call(tg.PRIVACY)

    get_privacy_report_async = twin(get_privacy_report)

    @blocking
    def refresh(self) -> Call[TrainingClientInfo]:
        """Ask the server for the run's step and status, and take them over."""
        return call(tg.GET, parts={"id": self._id}, decode=self._refreshed)

    refresh_async = twin(refresh)

    # -------------------------------------------------------------------------------------- how it is done

    def _call(
        self, route: Route[R], body: object = None, *, moves: bool = False, **options: Unpack[Options]
    ) -> Call[R]:
        """A call whose end tells what has become of the run: by its result where it ``moves`` the run, by its error."""
        self._calls += 1
        if moves:
            options["on_result"] = partial(self._take_step, self._calls)
        options["on_failure"] = partial(self._take_failure, self._calls)
        return call(route, body, parts={"id": self._id}, **options)

    def _take_step(self, number: int, result: OptimStepResult | LoadStateResult) -> None:
        if number < self._seen:
            return  # a later call's end was quicker
        self._seen, self._step = number, result.step
        limit = self._config.max_steps
        self._status = "completed" if limit is not None and result.step >= limit else "active"

    def _take_failure(self, number: int, failure: Failure) -> None:
        status = _STATUSES.get(failure.code or "")
        if status is not None and number >= self._seen:
            self._seen, self._status = number, status

    def _refreshed(self, data: Any) -> TrainingClientInfo:
        info = codec.decode(TrainingClientInfo, data)
        self._step, self._status = info.step, info.status
        return info


def _config_of(info: TrainingClientInfo) -> TrainingConfig:
    """The run's configuration as the server tells it; fields that only a newer server knows are passed over."""
    known = {field.name for field in attrs.fields(TrainingConfig)}
    return TrainingConfig.from_dict({name: value for name, value in info.config.items() if name in known})
