"""The operations of the TG surface, as the scheduler runs them: generators on the device thread."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.server.engine import Engine
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.server.training import states
from tg_tinker.server.training.runs import Run
from tg_tinker.server.work.generations import Completion, Generations, OnToken, seed_of
from tg_tinker.server.work.operations import Detached, Done, Offline, Steps
from tg_tinker.types import results
from tg_tinker.wire import tg

if TYPE_CHECKING:
    from tg_tinker.store.checkpoints import CheckpointStore


def forward_backward(
    run: Run, engine: Engine, ticket: Ticket, request: tg.ForwardBackwardRequest, batch_hash: str
) -> Steps[results.ForwardBackwardResult]:
    """A pass over a batch; in eval mode the loss alone."""
    begun = monotonic()
    if request.mode == "eval":
        output = yield from run.trainer.forward(engine.rows(request.batch))
    else:
        output = yield from run.train(ticket, lambda: engine.rows(request.batch))
    return results.ForwardBackwardResult(
        loss=output.loss,
        batch_hash=batch_hash,
        gradient_hash=run.gradient_hash(),
        num_tokens=output.num_tokens,
        latency_ms=_since(begun),
    )


def optim_step(
    run: Run, engine: Engine, ticket: Ticket, request: tg.OptimStepRequest
) -> Steps[results.OptimStepResult]:
    """One optimizer step of the run's own optimizer."""
    begun = monotonic()
    if request.mode == "eval":
        message = "mode: optim_step needs train mode; call train() first"
        raise InvalidRequestError(message, field="mode", constraint="train mode")
    run.check_trainable()
    run.check_gradients(ticket)
    yield from run.account()
    optimizer = engine.optimizer(**optimizer_fields(run.config, run.max_steps))
    output, metrics = run.step_with(optimizer, noise=request.apply_dp_noise)
    ticket.dp_metrics = None if metrics is None else metrics.to_dict()
    return results.OptimStepResult(
        grad_norm=output.grad_norm,
        learning_rate=output.learning_rate,
        step=output.step,
        dp_metrics=metrics,
        latency_ms=_since(begun),
    )


def optimizer_fields(config: dict[str, Any], max_steps: int | None) -> dict[str, Any]:
    """The engine's names for a run's optimizer."""
    optimizer = config["optimizer"]
    return {
        "name": optimizer["name"],
        "learning_rate": optimizer["learning_rate"],
        "betas": tuple(optimizer["betas"]),
        "eps": optimizer["eps"],
        "weight_decay": optimizer["weight_decay"],
        "momentum": optimizer["momentum"],
        "schedule": optimizer["lr_scheduler"],
        "warmup_steps": optimizer["warmup_steps"],
        "total_steps": max_steps,
        "schedule_kwargs": optimizer["lr_scheduler_kwargs"],
    }


class Sampling(Detached[results.SampleResult]):
    """The completions of one ``sample``, turned into its result."""

    def __init__(self, generations: Generations, prompts: Sequence[str], step: int) -> None:
        self._generations = generations
        self._prompts = prompts
        self._step = step
        self._begun = monotonic()

    def begin(self, done: Done) -> None:
        """Start sampling."""

        def convert(completions: list[Completion] | None, error: BaseException | None) -> None:
            done(None if completions is None else self._result(completions), error)

        self._generations.begin(convert)

    def cancel(self) -> None:
        """Stop sampling."""
        self._generations.cancel()

    def _result(self, completions: list[Completion]) -> results.SampleResult:
        samples = tuple(_sample(prompt, done) for prompt, done in zip(self._prompts, completions, strict=True))
        return results.SampleResult(
            samples=samples,
            total_tokens=sum(sample.num_tokens for sample in samples),
            latency_ms=_since(self._begun),
            model_step=self._step,
        )


def sample(
    run: Run,
    engine: Engine,
    request: tg.SampleRequest,
    prompts: Sequence[tuple[int, ...]],
    seed: int,
    on_token: OnToken | None = None,
) -> Steps[results.SampleResult]:
    """Take the adapter as it is at this place in the order; the sampling goes on outside the order."""
    yield from ()
    adapter = run.snapshot()
    asked = [
        (text, tokens)
        for text, tokens in zip(request.prompts, prompts, strict=True)
        for _ in range(request.num_completions)
    ]
    requests = [
        engine.generation(
            prompt=tokens,
            adapter=adapter,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k or None,
            stop=request.stop_sequences,
            seed=seed_of(seed, index),
            cache_key=run.tenant,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
        )
        for index, (_, tokens) in enumerate(asked)
    ]
    return Sampling(Generations(run.model.sampler, requests, on_token), [text for text, _ in asked], run.step)


def save_state(
    run: Run, store: CheckpointStore, ticket: Ticket, request: tg.SaveStateRequest
) -> Steps[results.SaveStateResult]:
    """Copy the state at this place in the order; durable when the ticket ends."""
    yield from ()
    saving = states.save(
        run, store, kind="tg_state", metadata=request.metadata, include_optimizer=request.include_optimizer
    )

    def write() -> results.SaveStateResult:
        record = saving.work()
        ticket.produced.append(record.artifact_id)
        return results.SaveStateResult(
            artifact_id=record.artifact_id,
            size_bytes=record.size_bytes,
            encryption=record.encryption,
            metadata=record.metadata,
            timestamp=record.created_at,
            step=record.step,
        )

    return Offline(write)


def load_state(
    run: Run, engine: Engine, store: CheckpointStore, ticket: Ticket, artifact_id: str
) -> Steps[results.LoadStateResult]:
    """Restore an artifact at this place in the order."""
    ticket.consumed.append(artifact_id)
    restored = yield from states.load(run, engine, lambda: store.load(run.tenant, artifact_id), with_optimizer=True)
    return results.LoadStateResult(
        artifact_id=artifact_id,
        step=restored.step,
        metadata=restored.record.metadata,
        timestamp=restored.record.created_at,
        exact=not restored.reasons,
        reasons=restored.reasons,
    )


def _sample(prompt: str, done: Completion) -> results.Sample:
    made = done.generation
    return results.Sample(
        prompt=prompt,
        completion=made.text,
        num_tokens=len(made.tokens),
        finish_reason=made.finish_reason,
        latency_ms=done.latency_ms,
        token_ids=made.tokens,
        logprobs=made.logprobs,
    )


def _since(begun: float) -> float:
    return (monotonic() - begun) * 1e3
