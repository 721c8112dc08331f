"""The TG surface against a real embedded server and the tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import attrs
import pytest
from fixtures.programs import BATCH, MODEL, tg_config

from tg_tinker import (
    BatchData,
    FutureHandle,
    InvalidRequestError,
    LoRAConfig,
    ResourceNotFoundError,
    SamplingConfig,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
    batch_hash,
)

pytestmark = pytest.mark.timeout(240)


def test_a_run_learns_its_batch(tc: TrainingClient) -> None:
    """Training on one batch lowers its loss, and step, status and results say what happened."""
    assert (tc.step, tc.status) == (0, "active")
    losses = []
    for number in range(1, 6):
        result = tc.forward_backward(BATCH).result(timeout=60)
        losses.append(result.loss)
        done = tc.optim_step().result(timeout=60)
        assert (done.step, tc.step) == (number, number)
        assert done.learning_rate == pytest.approx(1e-2)
        assert done.grad_norm > 0
        assert done.dp_metrics is None
    assert losses[-1] < losses[0] - 0.5
    assert result.num_tokens == 7  # 4 and 3 labels: the first token of each row has nothing before it
    assert result.batch_hash == batch_hash(BATCH)
    assert result.gradient_hash.startswith("sha256:")
    assert result.latency_ms > 0


def test_many_operations_may_be_on_their_way(tc: TrainingClient) -> None:
    """Futures can be collected first and awaited later; the server works them off in the order of the calls."""
    futures = [operation() for _ in range(4) for operation in (lambda: tc.forward_backward(BATCH), tc.optim_step)]
    results = [future.result(timeout=60) for future in futures]
    assert [result.step for result in results[1::2]] == [1, 2, 3, 4]
    assert tc.step == 4
    assert all(isinstance(future, FutureHandle) and future.is_success() for future in futures)


def test_gradients_add_up_until_the_step(service: ServiceClient) -> None:
    """Two half batches of equal size make the same step as the whole batch: the run averages over the step's labels."""
    whole, halves = (service.create_training_client(tg_config()) for _ in range(2))
    rows = {"input_ids": [[72, 101, 108], [87, 111, 114]]}
    whole.forward_backward(rows)
    for row in rows["input_ids"]:
        halves.forward_backward({"input_ids": [row]})
    one, two = whole.optim_step().result(timeout=60), halves.optim_step().result(timeout=60)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_a_batch_hash_is_verified(tc: TrainingClient) -> None:
    """A hash that is passed must be that of the batch which arrives."""
    assert tc.forward_backward(BATCH, batch_hash(BATCH)).result(timeout=60).batch_hash == batch_hash(BATCH)
    with pytest.raises(InvalidRequestError) as caught:
        tc.forward_backward(BATCH, "sha256:" + "0" * 64)
    assert caught.value.field == "batch_hash"


def test_evaluation_computes_the_loss_and_nothing_else(tc: TrainingClient) -> None:
    """In evaluation mode there is no gradient to apply, and ``optim_step`` is refused at the call."""
    tc.eval()
    first = tc.forward_backward(BATCH).result(timeout=60)
    with pytest.raises(InvalidRequestError) as caught:
        tc.optim_step()
    assert caught.value.field == "mode"
    tc.train()
    with pytest.raises(InvalidRequestError):
        tc.optim_step().result(timeout=60)
    assert tc.forward_backward(BATCH).result(timeout=60).loss == pytest.approx(first.loss)


def test_a_mode_belongs_to_the_calls_made_in_it(tc: TrainingClient) -> None:
    """A call keeps the mode in which it was made, whenever it is executed."""
    tc.forward_backward(BATCH)
    tc.eval()
    loss = tc.forward_backward(BATCH)
    tc.train()
    assert tc.optim_step().result(timeout=60).step == 1
    assert loss.result(timeout=60).loss > 0


def test_a_run_completes_at_max_steps(service: ServiceClient) -> None:
    """After ``max_steps`` the status is "completed" without a refresh; training is refused, sampling goes on."""
    tc = service.create_training_client(tg_config(max_steps=1))
    tc.forward_backward(BATCH)
    tc.optim_step().result(timeout=60)
    assert tc.status == "completed"
    with pytest.raises(InvalidRequestError):
        tc.forward_backward(BATCH).result(timeout=60)
    assert tc.sample("a", max_tokens=2).total_tokens <= 2
    assert tc.refresh().status == "completed"


def test_sampling_takes_every_parameter(tc: TrainingClient) -> None:
    """All parameters act together; completions come prompt by prompt, and the same seed gives the same ones."""
    arguments = {
        "prompts": ["Once", "Twice"],
        "max_tokens": 6,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "stop_sequences": ["zzzz"],
        "num_completions": 2,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "seed": 3,
    }
    result = tc.sample(**arguments)  # type: ignore[arg-type]
    assert [sample.prompt for sample in result.samples] == ["Once", "Once", "Twice", "Twice"]
    assert result.total_tokens == sum(sample.num_tokens for sample in result.samples)
    assert {sample.finish_reason for sample in result.samples} <= {"length", "stop", "eos"}
    again = tc.sample(**arguments)  # type: ignore[arg-type]
    assert [sample.completion for sample in again.samples] == [sample.completion for sample in result.samples]


def test_greedy_sampling_and_stops(tc: TrainingClient) -> None:
    """Temperature 0 needs no seed to repeat itself; a stop sequence ends the text before it and counts its token."""
    greedy = [tc.sample("Hello", max_tokens=12, temperature=0.0).samples[0] for _ in range(2)]
    assert greedy[0].token_ids == greedy[1].token_ids
    text = greedy[0].completion
    stop = next(character for character in text[1:] if character.isprintable() and character != "\ufffd")
    stopped = tc.sample("Hello", max_tokens=12, temperature=0.0, stop_sequences=[stop]).samples[0]
    assert (stopped.completion, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    assert stopped.num_tokens <= greedy[0].num_tokens


@pytest.mark.parametrize("stops", [None, ["o"]])
def test_a_stream_is_the_sample_in_pieces(tc: TrainingClient, stops: list[str] | None) -> None:
    """The pieces of a stream concatenate to what ``sample`` returns at the same seed; the last says why it ended."""
    chunks = list(tc.sample_stream("Hello", max_tokens=32, stop_sequences=stops, seed=5))
    sample = tc.sample("Hello", max_tokens=32, stop_sequences=stops, seed=5).samples[0]
    assert "".join(chunk.text for chunk in chunks) == sample.completion
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == sample.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [sample.finish_reason]


def test_a_stream_may_be_left_early(tc: TrainingClient) -> None:
    """Leaving a stream stops it; the run goes on."""
    for number, _ in enumerate(tc.sample_stream("Hello", max_tokens=2000)):
        if number == 3:
            break
    assert tc.forward_backward(BATCH).result(timeout=60).loss > 0


def test_samples_see_the_weights_of_their_place_in_the_order(tc: TrainingClient) -> None:
    """A sample called after a step is drawn from the weights after it, without waiting for anything in between."""
    tc.forward_backward(BATCH)
    tc.optim_step()
    assert tc.sample("a", max_tokens=1).model_step == 1


def test_a_saved_state_resumes_bit_for_bit(service: ServiceClient) -> None:
    """What is trained after a save is trained again exactly after its load, in the same run and in a new one."""
    config = tg_config(lora_config=LoRAConfig(rank=4, dropout=0.1))
    tc = service.create_training_client(config)
    tc.forward_backward(BATCH)
    tc.optim_step().result(timeout=60)
    saved = tc.save_state(metadata={"epoch": 5, "note": "é"})

    def two_steps(client: TrainingClient) -> list[tuple[str, float]]:
        pairs = [(client.forward_backward(BATCH), client.optim_step()) for _ in range(2)]
        return [(fb.result(timeout=60).gradient_hash, step.result(timeout=60).grad_norm) for fb, step in pairs]

    first = two_steps(tc)
    assert tc.step == 3
    loaded = tc.load_state(saved.artifact_id)
    assert (loaded.step, tc.step, loaded.metadata) == (1, 1, {"epoch": 5, "note": "é"})
    assert (loaded.exact, loaded.reasons) == (True, ())
    assert loaded.timestamp == saved.timestamp
    assert two_steps(tc) == first
    other = service.create_training_client(config, checkpoint_id=saved.artifact_id)
    assert other.step == 1
    assert two_steps(other) == first
    assert saved.encryption.algorithm == "AES-256-GCM"
    assert saved.size_bytes > 0


def test_kept_sampling_settings_act(tc: TrainingClient) -> None:
    """Every field of a SamplingConfig reaches the sample that its dict is given to."""
    greedy = SamplingConfig(max_tokens=6, temperature=0.0)
    (plain,) = tc.sample("Hello", **greedy.to_dict()).samples
    assert plain == attrs.evolve(tc.sample("Hello", 6, 0.0).samples[0], latency_ms=plain.latency_ms)
    warm = SamplingConfig(max_tokens=12, temperature=1.5, top_p=0.5, top_k=7, stop_sequences=["e"])
    named = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.5, "top_k": 7, "stop_sequences": ["e"]}
    assert warm.to_dict() == named
    (one,), (other,) = tc.sample("Hello", **warm.to_dict(), seed=3).samples, tc.sample("Hello", **named, seed=3).samples
    assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)


def test_an_artifact_can_be_pulled(service: ServiceClient, tc: TrainingClient, tmp_path: Path) -> None:
    """The sealed bytes of an artifact are returned and written, with the manifest that opens them before them."""
    saved = tc.save_state(include_optimizer=False)
    content = service.pull_artifact(saved.artifact_id, str(tmp_path / "state.bin"))
    assert content.startswith(b"tg-artifact/1")
    assert len(content) > saved.size_bytes
    assert (tmp_path / "state.bin").read_bytes() == content
    for wrong in (tmp_path / "absent" / "state.bin", tmp_path):
        with pytest.raises(InvalidRequestError) as caught:
            service.pull_artifact(saved.artifact_id, wrong)
        assert caught.value.field == "destination"


def test_runs_are_listed_attached_and_deleted(service: ServiceClient) -> None:
    """A run can be found by another client as it is, and is gone after its deletion."""
    tc = service.create_training_client(tg_config())
    tc.forward_backward(BATCH)
    tc.optim_step().result(timeout=60)
    attached = service.get_training_client(tc.id)
    assert (attached.id, attached.step, attached.status, attached.config) == (tc.id, 1, "active", tc.config)
    assert attached.forward_backward(BATCH).result(timeout=60).loss > 0
    listed = service.list_training_clients(status="active", limit=5)
    assert tc.id in [info.id for info in listed]
    service.delete_training_client(tc.id)
    with pytest.raises(ResourceNotFoundError) as caught:
        service.get_training_client(tc.id)
    assert caught.value.resource_id == tc.id
    with pytest.raises(ResourceNotFoundError):
        tc.forward_backward(BATCH).result(timeout=60)


def test_a_future_can_be_found_by_its_id(service: ServiceClient, tc: TrainingClient) -> None:
    """A handle made from an id gives the same result as the first one."""
    first = tc.forward_backward(BATCH)
    again = service.get_future(first.id)
    assert (again.id, again.operation) == (first.id, "forward_backward")
    assert again.result(timeout=60) == first.result(timeout=60)


def test_a_handle_knows_how_its_operation_ended(service: ServiceClient, tc: TrainingClient) -> None:
    """A handle made from the id of what has ended says so at once, before anybody waits for it."""
    good, bad = tc.forward_backward(BATCH), tc.forward_backward({"input_ids": [[10**6, 1]]})
    assert good.wait(60)
    assert bad.wait(60)
    done, failed = service.get_future(good.id), service.get_future(bad.id)
    assert (done.status, done.is_done(), done.is_success()) == ("completed", True, True)
    assert (failed.status, failed.is_failed()) == ("failed", True)
    assert isinstance(failed.get_error(), InvalidRequestError)
    assert bad.is_failed()  # looked at


@pytest.mark.parametrize("kind", [ServiceClient, TrainingClient])
def test_every_method_has_its_twin(kind: type) -> None:
    """Whatever talks to the server can be awaited under the same name with ``_async``, closing included."""
    local = {"aclose", "eval", "local", "train"}
    names = {name for name in dir(kind) if callable(getattr(kind, name)) and not name.startswith("_")} - local
    assert {name for name in names if f"{name.removesuffix('_async')}_async" not in names} == set()
    assert "close_async" in names or kind is TrainingClient


def test_the_tokenizer_is_the_servers(tc: TrainingClient) -> None:
    """The client encodes as the server does, gets the tokenizer once, and makes batches of texts with it."""
    tokenizer = tc.get_tokenizer()
    assert tokenizer.encode("Hé") == [72, 195, 169]
    assert tc.get_tokenizer() is tokenizer
    batch = BatchData.from_texts(tokenizer, ["a", "bcd"])
    assert tc.forward_backward(batch).result(timeout=60).num_tokens == 4


def test_a_config_may_be_a_dict(service: ServiceClient) -> None:
    """A plain dict is as good as a TrainingConfig, and comes back as one."""
    tc = service.create_training_client({"model_ref": MODEL, "lora_config": {"rank": 2}})
    assert isinstance(tc.config, TrainingConfig)
    assert tc.config.lora_config.rank == 2
    assert tc.config.seed is not None  # the server drew one


async def test_the_whole_surface_on_the_callers_loop(home: Path) -> None:
    """Inside ``async with`` every operation has its awaitable form; a future is awaited for its result."""
    async with ServiceClient(home=home) as service:
        tc = await service.create_training_client_async(tg_config())
        result = await (await tc.forward_backward_async(BATCH))
        step = await tc.optim_step()
        assert (step.step, tc.step) == (1, 1)
        texts, final = "", None
        async for chunk in tc.sample_stream_async("Hello", max_tokens=16, seed=5):
            texts, final = texts + chunk.text, chunk.finish_reason
        sampled = (await tc.sample_async("Hello", max_tokens=16, seed=5)).samples[0]
        assert (texts, final) == (sampled.completion, sampled.finish_reason)
        saved = await tc.save_state_async()
        assert (await tc.load_state_async(saved.artifact_id)).step == 1
        assert (await tc.refresh_async()).step == 1
        assert (await tc.get_tokenizer_async()).encode("a") == [97]
        again = await service.get_training_client_async(tc.id)
        futures = [await again.forward_backward_async(BATCH) for _ in range(3)]
        losses = [done.loss for done in await asyncio.gather(*futures)]
        assert losses == pytest.approx([losses[0]] * 3)
        assert result.loss > losses[0]
