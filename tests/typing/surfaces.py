"""What both surfaces are to a type checker. Never executed: every public member is named here with its type."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

import tg_tinker
from tg_tinker import loops
from tg_tinker.settings import Settings
from tg_tinker.types import loops_results, results

BATCH = {"input_ids": [[1]]}
DATA = [loops.Datum(loops.ModelInput.from_ints([1]))]


async def service(client: tg_tinker.ServiceClient) -> None:
    """The way in."""
    assert_type(client.create_training_client({"model_ref": "m"}), tg_tinker.TrainingClient)
    assert_type(
        await client.create_training_client_async(tg_tinker.TrainingConfig(model_ref="m"), None),
        tg_tinker.TrainingClient,
    )
    assert_type(client.get_training_client("tc-1"), tg_tinker.TrainingClient)
    assert_type(client.list_training_clients(status="active", limit=1), list[results.TrainingClientInfo])
    assert_type(await client.list_training_clients_async(), list[results.TrainingClientInfo])
    client.delete_training_client("tc-1")
    client.get_future("fut-1").result(timeout=1)
    assert_type(client.pull_artifact("art-1", "file"), bytes)
    assert_type(client.get_audit_logs(), list[results.AuditLogEntry])
    assert_type(client.verify_audit_log().ok, bool)
    assert_type(client.create_lora_training_client("m", rank=8), loops.TrainingClient)
    assert_type(await client.create_lora_training_client_async("m", 8, seed=1), loops.TrainingClient)
    assert_type(client.create_training_client_from_state("p"), loops.TrainingClient)
    assert_type(await client.create_training_client_from_state_with_optimizer_async("p"), loops.TrainingClient)
    assert_type(client.attach("run-1"), loops.TrainingClient)
    client.deactivate_run("run-1")
    with client.attach("run-1") as run:
        assert_type(run, loops.TrainingClient)
    assert_type(loops.ServiceClient.local(trainer_url="u").attach(), loops.TrainingClient)
    assert_type(client.download_checkpoint("c", dest_dir="d"), loops.CheckpointDownload)
    assert_type(client.create_sampling_client("m"), loops.SamplingClient)
    assert_type(await client.create_sampling_client_async(model_path="p"), loops.SamplingClient)
    assert_type(client.list_checkpoints("run-1"), list[loops_results.Checkpoint])
    assert_type(client.get_checkpoint_archive_url("c"), loops_results.CheckpointFilesResponse)
    assert_type(client.get_server_capabilities(), loops_results.ServerCapabilities)
    assert_type(client.config, Settings)
    assert_type(client.tenant_id, str | None)
    client.close()
    await client.aclose()
    with tg_tinker.ServiceClient("key", "http://host", timeout=1.0) as blocking:
        assert_type(blocking, tg_tinker.ServiceClient)
    async with loops.ServiceClient(base_url="http://host") as here:
        assert_type(here, loops.ServiceClient)


async def tg(client: tg_tinker.TrainingClient) -> None:
    """The TG run."""
    assert_type(client.id, str)
    assert_type(client.step, int)
    assert_type(client.status, str)
    assert_type(client.config, tg_tinker.TrainingConfig)
    assert_type(client.forward_backward(BATCH), tg_tinker.FutureHandle[results.ForwardBackwardResult])
    assert_type(client.forward_backward(BATCH, batch_hash="h").result().loss, float)
    assert_type(await (await client.forward_backward_async(BATCH)), results.ForwardBackwardResult)
    assert_type(client.optim_step().result(timeout=60), results.OptimStepResult)
    assert_type(await client.optim_step(apply_dp_noise=False), results.OptimStepResult)
    assert_type(client.sample(["a"], 5, 0.5, seed=1), results.SampleResult)
    assert_type(await client.sample_async("a", top_k=3), results.SampleResult)
    assert_type(client.sample_stream("a", 5, 0.5, top_p=0.5, seed=1), Iterator[results.StreamChunk])
    assert_type(client.sample_stream_async("a"), AsyncIterator[results.StreamChunk])
    assert_type(client.save_state(metadata={"a": 1}), results.SaveStateResult)
    assert_type(await client.load_state_async("art-1"), results.LoadStateResult)
    assert_type(client.refresh(), results.TrainingClientInfo)
    assert_type(client.get_privacy_report(), results.PrivacyReport)
    client.train()
    client.eval()


async def loops_run(client: loops.TrainingClient) -> None:
    """The Loops run."""
    assert_type(client.run_id, str | None)
    assert_type(client.policy_version, int)
    assert_type(await client.policy_version_async(), int)
    assert_type(client.forward_backward(DATA), loops.OperationFuture[loops_results.ForwardBackwardOutput])
    assert_type(client.forward(data=DATA, loss_fn="ppo").result(timeout=1.0), loops_results.ForwardBackwardOutput)
    assert_type(await (await client.forward_async(DATA, "dro", {"beta": 0.1})), loops_results.ForwardBackwardOutput)
    assert_type(client.optim_step(loops.AdamParams()).result(), loops_results.OptimStepResponse)
    assert_type(client.save_state("a", ttl_seconds=5).result(), loops_results.SaveWeightsResponse)
    assert_type(client.load_state("p").result(), loops_results.LoadWeightsResponse)
    assert_type(await (await client.load_state_with_optimizer_async("p")), loops_results.LoadWeightsResponse)
    assert_type(client.save_weights_for_sampler("a").result(), loops_results.SaveWeightsForSamplerResponse)
    assert_type(client.save_weights_and_get_sampling_client("a"), loops.OperationFuture[loops.SamplingClient])
    assert_type(await client.save_weights_and_get_sampling_client_async("a"), loops.SamplingClient)
    assert_type(client.create_sampling_client("p"), loops.SamplingClient)
    assert_type(client.list_checkpoints(), list[loops_results.Checkpoint])
    assert_type(client.get_info(), loops_results.GetInfoResponse)
    assert_type(client.init_trainer_server(8).result(), loops_results.InitTrainerServerResponse)
    future: loops.ForwardBackwardFuture = client.forward(DATA)
    assert_type(future.result().metrics, dict[str, float])
    custom = await client.forward_backward_custom_async(DATA, lambda data, logprobs: (0.0, [], {}))
    assert_type(await custom, loops_results.ForwardBackwardOutput)
    client.health()
    client.close()
    await client.aclose()


async def sampler(client: loops.SamplingClient) -> None:
    """The sampler."""
    prompt = loops.ModelInput.from_ints([1])
    answer = assert_type(
        client.sample(prompt, 2, loops.SamplingParams(), affinity_key="a"), loops_results.SampleResponse
    )
    assert_type(answer.sequences[0].tokens, tuple[int, ...])
    assert_type(await client.sample_async([1, 2], num_samples=1), loops_results.SampleResponse)
    assert_type(client.compute_logprobs(prompt), list[float | None])
    assert_type(await client.compute_logprobs_async(prompt), list[float | None])
    assert_type(client.get_base_model(), str)
    client.ensure_ready(5.0)
    await client.aclose()
