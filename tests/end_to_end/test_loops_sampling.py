"""Published versions and samplers, against a real embedded server and the tiny model."""

from __future__ import annotations

import pytest
from fixtures.programs import MODEL, datum

from tg_tinker import (
    AdamParams,
    ModelInput,
    ResourceNotFoundError,
    SamplingParams,
    ServiceClient,
    loops,
)

pytestmark = pytest.mark.timeout(240)
STEP = AdamParams(learning_rate=1e-2)


def test_a_pinned_client_keeps_its_version(trainer: loops.TrainingClient) -> None:
    """What a client samples and scores stays the same however the run goes on, and differs from later versions."""
    prompt, params = ModelInput.from_ints([72, 101]), SamplingParams(max_tokens=8, temperature=0.0)
    one = trainer.save_weights_and_get_sampling_client("v").result(timeout=120)
    before = one.sample(prompt, sampling_params=params)
    scores = one.compute_logprobs(prompt)
    for _ in range(4):
        trainer.forward_backward([datum()])
        trainer.optim_step(STEP)
    two = trainer.save_weights_and_get_sampling_client("v").result(timeout=120)
    after = two.sample(prompt, sampling_params=params)
    assert (before.policy_version, after.policy_version) == (one.min_policy_version, two.min_policy_version)
    assert (two.min_policy_version or 0) > (one.min_policy_version or 0)
    assert one.sample(prompt, sampling_params=params).sequences[0].tokens == before.sequences[0].tokens
    assert one.compute_logprobs(prompt)[1] == pytest.approx(scores[1], abs=1e-5)
    assert two.compute_logprobs(prompt)[1] != pytest.approx(scores[1], abs=1e-3)


def test_a_sampler_scores_as_the_trainer_does(trainer: loops.TrainingClient) -> None:
    """Prompt logprobs of the published weights are the trainer's own."""
    trainer.forward_backward([datum()])
    trainer.optim_step(STEP)
    wanted = trainer.forward([datum()]).result(timeout=60).loss_fn_outputs[0]["logprobs"].tolist()
    sampler = trainer.save_weights_and_get_sampling_client("s").result(timeout=120)
    scores = sampler.compute_logprobs(datum().model_input)
    assert scores[0] is None
    assert scores[1:] == pytest.approx(wanted[:-1], abs=1e-4)


def test_sampling_takes_every_parameter(trainer: loops.TrainingClient) -> None:
    """Several samples of one prompt, prompt logprobs and their best alternatives, stops, seeds and affinity."""
    sampler = trainer.save_weights_and_get_sampling_client("p").result(timeout=120)
    params = SamplingParams(max_tokens=6, temperature=0.7, top_k=40, top_p=0.9, seed=3, stop=(10,))
    answer = sampler.sample([72, 101, 108], 3, params, True, 2, affinity_key="talk-1")
    assert len(answer.sequences) == 3
    assert all(len(one.tokens) == len(one.logprobs or ()) <= 6 for one in answer.sequences)
    assert len({one.tokens for one in answer.sequences}) > 1
    assert answer.prompt_logprobs is not None
    assert answer.topk_prompt_logprobs is not None
    assert [answer.prompt_logprobs[0], answer.topk_prompt_logprobs[0]] == [None, None]
    assert [len(best or ()) for best in answer.topk_prompt_logprobs[1:]] == [2, 2]
    again = sampler.sample([72, 101, 108], 3, params)
    assert [one.tokens for one in again.sequences] == [one.tokens for one in answer.sequences]
    assert again.prompt_logprobs is None


def test_samplers_of_base_models_and_checkpoints(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """A base model and a saved adapter can be sampled without the run; both say what they serve."""
    params = SamplingParams(max_tokens=4, temperature=0.0)
    for _ in range(3):
        trainer.forward_backward([datum()])
        trainer.optim_step(STEP)
    path = trainer.save_weights_for_sampler("kept").result(timeout=60).path
    base = service.create_sampling_client(MODEL)
    saved = service.create_sampling_client(model_path=path)
    paired = trainer.create_sampling_client(path)
    base.ensure_ready(30.0)
    assert (base.get_base_model(), saved.checkpoint_path, paired.checkpoint_path) == (MODEL, path, path)
    prompt = [72, 101]
    score = saved.compute_logprobs(prompt)[1]
    assert score == pytest.approx(paired.compute_logprobs(prompt)[1], abs=1e-5)
    assert score != pytest.approx(base.compute_logprobs(prompt)[1], abs=1e-3)
    (sequence,) = base.sample(prompt, 1, params).sequences
    assert sequence.text == base.get_tokenizer().decode(sequence.tokens, skip_special_tokens=True)
    with pytest.raises(ResourceNotFoundError):
        trainer.create_sampling_client(f"bt://loops:{trainer.run_id}/sampler_weights/nowhere")
