"""Training on the Loops surface, against a real embedded server and the tiny model."""

from __future__ import annotations

import asyncio
import hashlib
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.programs import LOOPS_RANK, MODEL, datum

from tg_tinker import (
    AdamParams,
    Datum,
    ModelInput,
    ResourceNotFoundError,
    SamplingParams,
    ServiceClient,
    TensorData,
    loops,
)
from tg_tinker.errors import InvalidRequestError, OperationFailedError

pytestmark = pytest.mark.timeout(240)
STEP = AdamParams(learning_rate=1e-2)


def test_training_lowers_the_loss(trainer: loops.TrainingClient) -> None:
    """Each pass reports the mean over active tokens and every position's logprob; steps are counted by the trainer."""
    outputs = []
    for number in range(1, 5):
        future = trainer.forward_backward(data=[datum()])
        outputs.append(future.result(timeout=60.0))
        step = trainer.optim_step(STEP).result(timeout=60.0)
        assert step.metrics is not None
        assert step.metrics["step"] == number
        assert trainer.policy_version == number
    first = outputs[0]
    logprobs = first.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert logprobs.shape == (5,)
    assert logprobs[-1] == 0.0
    assert first.loss == pytest.approx(-logprobs[:-1].mean(), rel=1e-5)
    assert first.metrics["loss:sum"] == pytest.approx(-logprobs.sum(), rel=1e-5)
    assert first.metrics["num_tokens"] == 4
    assert outputs[-1].loss < first.loss - 0.5


def test_forward_leaves_gradients_alone(trainer: loops.TrainingClient) -> None:
    """A forward pass between backward passes changes nothing of the step, and alone leaves nothing to apply."""
    trainer.forward([datum()]).result(timeout=60)
    with pytest.raises(InvalidRequestError):
        trainer.optim_step(STEP).result(timeout=60)
    trainer.forward_backward([datum()])
    trainer.forward([datum(1, 2, 3)])
    assert trainer.optim_step(STEP).result(timeout=60).metrics is not None


def test_importance_sampling_follows_the_advantage(trainer: loops.TrainingClient) -> None:
    """A positive advantage raises the probability of what was sampled."""
    old = trainer.forward([datum()]).result(timeout=60).loss_fn_outputs[0]["logprobs"].tolist()
    example = datum(logprobs=old, advantages=[1.0, 1.0, 1.0, 1.0, 0.0])
    result = trainer.forward_backward([example], loss_fn="importance_sampling").result(timeout=60)
    assert result.metrics["loss"] == pytest.approx(-1.0, rel=1e-4)  # the ratio is 1 where nothing has changed
    trainer.optim_step(STEP).result(timeout=60)
    new = trainer.forward([datum()]).result(timeout=60).loss_fn_outputs[0]["logprobs"].tolist()
    assert sum(new) > sum(old)


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", None),
        ("dro", {"beta": 0.1}),
        ("dppo", None),
    ],
)
def test_every_rl_loss_trains(trainer: loops.TrainingClient, loss: Any, config: Mapping[str, float] | None) -> None:
    """The losses of the page are accepted with their settings and leave a gradient."""
    old = trainer.forward([datum()]).result(timeout=60).loss_fn_outputs[0]["logprobs"].tolist()
    example = datum(logprobs=old, advantages=[1.0, -1.0, 0.5, 0.0, 0.0])
    trainer.forward_backward([example], loss, config).result(timeout=60)
    step = trainer.optim_step(STEP).result(timeout=60)
    assert step.metrics is not None
    assert step.metrics["grad_norm"] > 0


def test_a_loss_of_ones_own_equals_the_servers(service: ServiceClient) -> None:
    """Cross-entropy written by the caller, in torch and in numpy, gives the gradient of the server's own sum."""

    def by_torch(_: Sequence[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return -sum(values.sum() for values in logprobs), {"mine": 2.0}

    def by_numpy(_: Sequence[Datum], logprobs: list[Any]) -> tuple[float, list[Any], dict[str, float]]:
        return -float(sum(values.sum() for values in logprobs)), [-np.ones_like(values) for values in logprobs], {}

    def norm(run: loops.TrainingClient) -> float:
        metrics = run.optim_step(AdamParams(grad_clip_norm=0.0)).result(timeout=60).metrics
        assert metrics is not None
        return metrics["grad_norm"]

    run = service.create_lora_training_client(MODEL, LOOPS_RANK, seed=1)
    run.save_state("start").result(timeout=60)
    path = f"bt://loops:{run.run_id}/weights/start"
    own = run.forward_backward([datum()], "cross_entropy", {"skip_token_normalization": True}).result(timeout=60)
    wanted = norm(run)
    run.load_state_with_optimizer(path)
    torch_output = run.forward_backward_custom([datum()], by_torch).result(timeout=60)
    assert torch_output.metrics["mine"] == 2.0
    assert torch_output.loss == pytest.approx(own.metrics["loss:sum"], rel=1e-5)
    assert norm(run) == pytest.approx(wanted, rel=1e-4)
    run.load_state_with_optimizer(path)
    run.forward_backward_custom([datum()], by_numpy, loss_type_input="numpy").result(timeout=60)
    assert norm(run) == pytest.approx(wanted, rel=1e-4)


def test_a_loss_of_ones_own_may_fail(trainer: loops.TrainingClient) -> None:
    """What the caller's function raises comes out of the future, as does a wrong answer of it; the run goes on."""

    def broken(*_: object) -> tuple[Any, ...]:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.forward_backward_custom([datum()], broken).result(timeout=60)
    with pytest.raises(InvalidRequestError) as caught:
        trainer.forward_backward_custom([datum()], lambda *_: (1.0, {})).result(timeout=60)
    assert caught.value.field == "loss_fn"
    assert trainer.forward_backward([datum()]).result(timeout=60).loss > 0


def test_a_loss_of_ones_own_keeps_its_place_in_the_order(trainer: loops.TrainingClient) -> None:
    """A step called right behind it applies its gradient; behind one that fails, the step is not taken."""

    def slow(_: Sequence[Datum], logprobs: list[Any]) -> tuple[float, list[Any], dict[str, float]]:
        time.sleep(0.2)
        return 0.0, [np.ones_like(values) for values in logprobs], {}

    trainer.forward_backward_custom([datum()], slow, loss_type_input="numpy")
    step = trainer.optim_step(STEP).result(timeout=60)
    assert step.metrics is not None
    assert (step.metrics["step"], step.metrics["grad_norm"] > 0) == (1, True)

    failing = trainer.forward_backward_custom([datum()], lambda *_: None, loss_type_input="numpy")  # type: ignore[arg-type]
    with pytest.raises(OperationFailedError):
        trainer.optim_step(STEP)
    assert isinstance(failing.exception(timeout=60), InvalidRequestError)
    assert trainer.policy_version == 1


def test_a_checkpoint_resumes_bit_for_bit(trainer: loops.TrainingClient) -> None:
    """After ``load_state_with_optimizer`` training repeats itself exactly."""
    trainer.forward_backward([datum()])
    trainer.optim_step(STEP)
    saved = trainer.save_state(name="step-1").result(timeout=60.0)
    assert saved.path == f"bt://loops:{trainer.run_id}/weights/step-1"

    def two_steps() -> list[float]:
        losses = []
        for _ in range(2):
            losses.append(trainer.forward_backward([datum()]).result(timeout=60).loss)
            trainer.optim_step(STEP)
        return [*losses, trainer.forward([datum()]).result(timeout=60).loss]

    first = two_steps()
    assert trainer.load_state_with_optimizer(saved.path).result(timeout=60).step == 1
    assert trainer.policy_version == 1
    assert two_steps() == first
    assert trainer.load_state(saved.path).result(timeout=60).step == 1


def test_a_new_run_starts_from_a_checkpoint(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """A client made from a state has the checkpoint's rank, step and weights."""
    trainer.forward_backward([datum()])
    trainer.optim_step(STEP)
    path = trainer.save_state("here").result(timeout=60).path
    loss = trainer.forward([datum()]).result(timeout=60).loss
    resumed = service.create_training_client_from_state_with_optimizer(path)
    assert resumed.run_id != trainer.run_id
    assert (resumed.policy_version, resumed.get_info().lora_rank) == (1, LOOPS_RANK)
    assert resumed.forward([datum()]).result(timeout=60).loss == loss
    assert service.create_training_client_from_state(path).forward([datum()]).result(timeout=60).loss == loss
    with pytest.raises(ResourceNotFoundError):
        service.create_training_client_from_state(f"bt://loops:{trainer.run_id}/weights/nowhere")


def test_checkpoints_are_listed_and_their_files_fetched(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """A checkpoint is found by name and by id; each file is at a URL that anyone can fetch, and has the digest told."""
    trainer.save_state("one", ttl_seconds=3600).result(timeout=60)
    trainer.save_weights_for_sampler("two").result(timeout=60)
    found = {one.checkpoint_id: one for one in trainer.list_checkpoints()}
    assert {name: one.target for name, one in found.items()} == {"one": "trainer", "two": "sampler"}
    assert found["one"].expires_at is not None
    assert service.list_checkpoints(str(trainer.run_id)) == trainer.list_checkpoints()
    by_name = trainer.get_checkpoint_archive_url("one")
    by_id = service.get_checkpoint_archive_url(found["one"].id)
    names = [file.relative_file_name for file in by_name.presigned_urls]
    assert names == [file.relative_file_name for file in by_id.presigned_urls]
    assert by_name.total_count == len(names) > 1
    page = trainer.get_checkpoint_archive_url("one", page_size=1)
    assert [file.relative_file_name for file in page.presigned_urls] == names[:1]
    rest = trainer.get_checkpoint_archive_url("one", page_token=page.next_page_token or 0)
    assert [file.relative_file_name for file in rest.presigned_urls] == names[1:]
    for file in by_name.presigned_urls:
        with urllib.request.urlopen(file.url, timeout=30) as answer:
            content = answer.read()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size_bytes, file.sha256)


def test_the_small_calls(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """Health, info, tokenizer, capabilities and the run's id are there."""
    trainer.health()
    info = trainer.get_info()
    assert (info.model_name, info.is_lora, info.lora_rank, info.max_seq_len) == (MODEL, True, LOOPS_RANK, 2048)
    assert trainer.get_tokenizer().encode("a") == [97]
    capabilities = service.get_server_capabilities()
    assert MODEL in [model.model_name for model in capabilities.supported_models]
    assert {"cross_entropy", "ppo"} <= set(capabilities.losses)
    assert trainer.run_id is not None


def test_a_fresh_adapter_on_the_same_trainer(trainer: loops.TrainingClient) -> None:
    """``init_trainer_server`` starts again at step 0 with another rank, which ``get_info`` knows at once."""
    trainer.forward_backward([datum()])
    trainer.optim_step(STEP).result(timeout=60)
    answer = trainer.init_trainer_server(8).result(timeout=60)
    assert (answer.lora_rank, answer.step) == (8, 0)
    assert (trainer.get_info().lora_rank, trainer.policy_version) == (8, 0)


def test_attaching_resets_nothing(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """Another client of a live trainer finds its weights, step and rank as they are."""
    trainer.forward_backward([datum()])
    trainer.optim_step(STEP).result(timeout=60)
    other = service.attach(str(trainer.run_id))
    assert (other.policy_version, other.get_info()) == (1, trainer.get_info())
    assert other.forward([datum()]).result(timeout=60) == trainer.forward([datum()]).result(timeout=60)
    with pytest.raises(ResourceNotFoundError):
        service.attach("run-nowhere")


def test_a_masked_example_from_texts(trainer: loops.TrainingClient) -> None:
    """The builder for prompt and answer makes an example in which the answer alone counts."""
    example = Datum.from_prompt_answer(trainer.get_tokenizer(), "Q: ", "A")
    assert trainer.forward_backward([example]).result(timeout=60).metrics["num_tokens"] == 2  # "A" and the end of text


async def test_the_whole_surface_on_the_callers_loop(home: Path) -> None:
    """Every operation has its awaitable form; long ones give a future that is awaited for the result."""
    async with loops.ServiceClient(home=home) as service:
        run = await service.create_lora_training_client_async(base_model=MODEL, rank=LOOPS_RANK, seed=1)
        output = await (await run.forward_backward_async([datum()]))
        assert output.loss > 0
        assert (await run.forward([datum()])).loss == output.loss
        assert (await (await run.optim_step_async(STEP))).metrics is not None
        assert await run.policy_version_async() == 1
        await run.health_async()
        saved = await (await run.save_state_async("a"))
        assert (await (await run.load_state_async(saved.path))).step == 1
        assert (await (await run.load_state_with_optimizer_async(saved.path))).step == 1
        assert (await (await run.save_weights_for_sampler_async("b"))).version == 1
        sampler = await run.save_weights_and_get_sampling_client_async("c")
        params = SamplingParams(max_tokens=4, seed=1)
        answers = await asyncio.gather(*(sampler.sample_async([72], 1, params) for _ in range(4)))
        assert len({answer.sequences[0].tokens for answer in answers}) == 1
        assert len(await sampler.compute_logprobs_async([72, 73])) == 2
        assert [one.checkpoint_id for one in await run.list_checkpoints_async()]
        other = await service.attach_async(str(run.run_id))
        assert await other.policy_version_async() == 1
        assert (await run.get_tokenizer_async()).encode("a") == [97]
        await sampler.aclose()
        await run.aclose()
        assert await other.policy_version_async() == 1


def test_targets_may_be_absent(trainer: loops.TrainingClient) -> None:
    """Without targets a datum learns its own next tokens."""
    ids = [72, 101, 108, 108, 111]
    bare = trainer.forward([Datum(ModelInput.from_ints(ids))]).result(timeout=60)
    assert bare.loss == trainer.forward([datum(*ids)]).result(timeout=60).loss


def test_soft_targets(trainer: loops.TrainingClient) -> None:
    """Cross-entropy takes several weighted targets per position."""
    targets = TensorData([[2, 3], [3, 4]], "int64")
    weights = TensorData([[0.25, 0.75], [1.0, 0.0]])
    example = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": targets, "weights": weights})
    output = trainer.forward([example]).result(timeout=60)
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert logprobs.shape == (2, 2)
    assert output.metrics["loss:sum"] == pytest.approx(-(logprobs * weights.to_numpy()).sum(), rel=1e-5)
