"""Differential privacy as a client sees it: metrics, the budget, the report. Its mathematics are tested elsewhere."""

from __future__ import annotations

import pytest
from fixtures.programs import BATCH, LOOPS_RANK, MODEL, datum, tg_config

from tg_tinker import AdamParams, Datum, DPBudgetExceededError, DPConfig, ModelInput, ServiceClient, TensorData
from tg_tinker.errors import InvalidRequestError

pytestmark = pytest.mark.timeout(240)


def test_a_private_run_trains_to_its_budget(service: ServiceClient) -> None:
    """Each step tells what it spent; the step that would overspend is refused with the numbers, and saving goes on."""
    config = DPConfig(noise_multiplier=2.0, max_grad_norm=1.0, target_epsilon=6.0, target_delta=1e-3)
    tc = service.create_training_client(tg_config(dp_config=config, batch_size=2))
    spent: list[float] = []

    def train() -> None:
        for _ in range(20):
            tc.forward_backward(BATCH).result(timeout=60)
            metrics = tc.optim_step().result(timeout=60).dp_metrics
            assert metrics is not None
            assert metrics.noise_applied
            spent.append(metrics.total_epsilon or 0.0)

    with pytest.raises(DPBudgetExceededError) as caught:
        train()
    assert len(spent) > 1
    assert spent == sorted(spent)
    assert caught.value.current_epsilon == pytest.approx(spent[-1])
    assert caught.value.current_epsilon <= caught.value.max_epsilon == 6.0
    assert (caught.value.projected_epsilon or 0.0) > 6.0
    assert caught.value.delta == 1e-3
    assert tc.step == len(spent)
    assert tc.save_state().step == len(spent)
    report = tc.get_privacy_report()
    assert (report.enabled, report.steps, report.delta) == (True, len(spent), 1e-3)
    assert report.total_epsilon == pytest.approx(spent[-1])


def test_a_private_batch_may_have_nothing_to_predict(service: ServiceClient) -> None:
    """A refusal would tell what the examples are like: it adds nothing, and its step is noise, and charged."""
    tc = service.create_training_client(tg_config(dp_config=DPConfig(), batch_size=2))
    result = tc.forward_backward({"input_ids": [[1, 2], [3, 4]], "labels": [[-100] * 2] * 2}).result(timeout=60)
    assert (result.loss, result.num_tokens) == (0.0, 0)
    metrics = tc.optim_step().result(timeout=60).dp_metrics
    assert metrics is not None
    assert (metrics.noise_applied, metrics.grad_norm_before_clip) == (True, 0.0)
    assert metrics.epsilon_spent
    run = service.create_lora_training_client(
        MODEL, LOOPS_RANK, seed=1, dp_config={"noise_multiplier": 2.0, "expected_batch_size": 1}
    )
    ignored = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": TensorData([-100, -100], "int64")})
    assert run.forward_backward([ignored]).result(timeout=60).loss == 0.0


def test_a_doubtful_promise_is_warned_of(service: ServiceClient, caplog: pytest.LogCaptureFixture) -> None:
    """A weak δ, and a rate that the batch size belies, are told when the run is made and in its report."""
    doubtful = DPConfig(target_delta=1e-2, dataset_size=100, sample_rate=0.5, expected_batch_size=2)
    with caplog.at_level("WARNING", logger="tg_tinker.service"):
        tc = service.create_training_client(tg_config(dp_config=doubtful))
    assert all(word in caplog.text for word in (tc.id, "target_delta", "sample_rate"))
    assert len(tc.get_privacy_report().warnings) == 2
    caplog.clear()
    sound = service.create_training_client(tg_config(dp_config=DPConfig(dataset_size=100, target_delta=1e-4)))
    assert (caplog.text, sound.get_privacy_report().warnings) == ("", ())


def test_the_loops_surface_is_private_too(service: ServiceClient) -> None:
    """A Loops run takes the same configuration, as a dict as well, and reports its epsilon with each step."""
    run = service.create_lora_training_client(
        MODEL, LOOPS_RANK, seed=1, dp_config={"noise_multiplier": 2.0, "expected_batch_size": 1}
    )
    run.forward_backward([datum()])
    metrics = run.optim_step(AdamParams()).result(timeout=60).metrics
    assert metrics is not None
    assert metrics["epsilon"] > 0


def test_a_loss_of_the_callers_own_is_refused(service: ServiceClient) -> None:
    """Such a loss may tie examples together, so a private run takes none of it, and says so."""
    run = service.create_lora_training_client(MODEL, LOOPS_RANK, dp_config={"expected_batch_size": 1})
    passed = run.forward_backward_custom([datum()], lambda _, logprobs: (-sum(one.sum() for one in logprobs), {}))
    with pytest.raises(InvalidRequestError, match="forward_backward_custom"):
        passed.result(timeout=60)
