"""What the published client can do since 0.7: downloads, its own losses, more ways to make runs and samplers."""

from __future__ import annotations

import math
import pickle

import httpx
import pytest
from baseten.loops import ModelInput, SamplingParams, ServiceClient
from published import PROMPT, SECONDS, STEP, TEXTS, TINY, datum, learn, lesson, logprobs, publish, version

pytestmark = pytest.mark.skipif(version() < (0, 26), reason="this version of the client has none of it")

MODEL_INPUT = ModelInput.from_ints(PROMPT)


def test_a_run_is_made_with_everything(service):
    """Every argument of create_lora_training_client that this server has a meaning for is taken."""
    with service.create_lora_training_client(
        base_model=TINY, rank=4, seed=1, max_seq_len=64, name="named", with_sampler=True, sampler_num_replicas=1
    ) as trainer:
        assert trainer.base_checkpoint is None
        first, second = learn(trainer, 2)
        assert second < first
        sampler = publish(trainer, "p")
        assert sampler.sample(MODEL_INPUT, 1, SamplingParams(max_tokens=2)).policy_version == 1
        sampler.close()


def test_a_checkpoint_is_downloaded(service, trainer, tmp_path):
    """download_checkpoint writes every file of the archive, found by name and target or by id, and counts the bytes."""
    trainer.save_weights_for_sampler("d").result(timeout=SECONDS)
    trainer.save_state("d").result(timeout=SECONDS)
    with pytest.raises(ValueError, match="target"):
        trainer.download_checkpoint(name="d", dest_dir=str(tmp_path / "none"))
    listed = trainer.get_checkpoint_archive_url(name="d", target="sampler")
    (by_id,) = [one for one in trainer.list_checkpoints() if one.target == "sampler"]
    for got in (
        trainer.download_checkpoint(name="d", target="sampler", dest_dir=str(tmp_path / "by-name")),
        service.download_checkpoint(by_id.id, dest_dir=str(tmp_path / "by-id")),
    ):
        files = {str(path.relative_to(got.dest_dir)): path.stat().st_size for path in got.dest_dir.rglob("*.*")}
        assert files == {one.relative_file_name: one.size_bytes for one in listed.presigned_urls}
        assert (got.file_count, got.bytes_written) == (len(files), sum(files.values()))


def test_a_checkpoint_is_served_without_its_run(service, trainer):
    """A sampler of the service's own, made for a path, serves that checkpoint; an affinity is taken."""
    learn(trainer, 2)
    path = trainer.save_weights_for_sampler("alone").result(timeout=SECONDS).path
    (wanted,) = logprobs(trainer.forward([datum(PROMPT)], "cross_entropy").result(timeout=SECONDS))
    learn(trainer, 2)
    sampler = service.create_sampling_client(model_path=path)
    assert sampler.checkpoint_path == path
    assert sampler.compute_logprobs(MODEL_INPUT, affinity_key="group")[1:] == pytest.approx(wanted, abs=1e-3)
    sampler.close()


def test_a_loss_of_the_callers_own(trainer):
    """forward_backward_custom steps along the caller's gradient: the sum of squares of the log-probabilities falls."""

    def squares(data, found):
        loss = sum((one**2).sum() for one in found)
        return loss, {"squares": loss.item()}

    seen = []
    for _ in range(4):
        output = trainer.forward_backward_custom(lesson(), squares).result(timeout=SECONDS)
        seen.append(output.metrics["squares"])
        expected = sum(value**2 for values in logprobs(output) for value in values)
        assert output.metrics["squares"] == pytest.approx(expected, rel=1e-3)
        trainer.optim_step(STEP).result(timeout=SECONDS)
    assert seen == sorted(seen, reverse=True)


def test_preferences_are_learnt(trainer):
    """The loss of dpo begins at log 2, which is what no preference costs, and falls."""
    reference = logprobs(trainer.forward(lesson(), "cross_entropy").result(timeout=SECONDS))
    data = [
        datum(text, weights=[1.0] * len(values), ref_logprobs=values)
        for text, values in zip(TEXTS, reference, strict=True)
    ]
    losses = []
    for _ in range(3):
        losses.append(trainer.forward_backward(data, "dpo").result(timeout=SECONDS).loss)
        trainer.optim_step(STEP).result(timeout=SECONDS)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses == sorted(losses, reverse=True)


def test_a_client_is_carried_to_another_process(trainer):
    """A pickled sampling client samples from the version that the first one does."""
    learn(trainer, 2)
    sampler = publish(trainer, "carried")
    params = SamplingParams(max_tokens=8, seed=11)
    copy = pickle.loads(pickle.dumps(sampler))
    first, second = (one.sample(MODEL_INPUT, 1, params) for one in (sampler, copy))
    assert list(first.sequences[0].tokens) == list(second.sequences[0].tokens)
    assert first.policy_version == second.policy_version
    sampler.close()


def test_a_warm_machine_is_asked_for(server, trainer):
    """A service that asks to reuse the machine of an earlier run gets a run of its own: there is nothing to warm up."""
    again = ServiceClient(base_url=server.url, api_key=server.key, reuse_from_run_id=trainer.run_id)
    with again.create_lora_training_client(base_model=TINY, rank=4) as other:
        assert other.run_id != trainer.run_id
        assert other.policy_version == 0


@pytest.mark.parametrize(
    ("named", "ask"),
    [
        ("top_k_logprobs", lambda trainer: trainer.forward(lesson(), "cross_entropy", top_k_logprobs=3)),
        (
            "structured_outputs",
            lambda trainer: publish(trainer, "p").sample(
                MODEL_INPUT, 1, SamplingParams(max_tokens=2, structured_outputs={"regex": "a+"})
            ),
        ),
        (
            "include_routed_experts",
            lambda trainer: publish(trainer, "p").sample(
                MODEL_INPUT, 1, SamplingParams(max_tokens=2), include_routed_experts=True
            ),
        ),
    ],
)
def test_what_is_not_offered_is_refused(trainer, named, ask):
    """What this server has no meaning for is refused by name: leaving it out would be an answer to another question."""
    with pytest.raises(httpx.HTTPStatusError, match=named):
        ask(trainer)
