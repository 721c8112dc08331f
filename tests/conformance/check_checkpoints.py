"""Checkpoints: saved, listed, fetched, and gone on from."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import httpx
import pytest
from baseten.loops import RemoteOpError
from published import SECONDS, TINY, kinds_saved, learn, lesson


def loss(trainer) -> float:
    """What the trainer has not learnt yet."""
    return trainer.forward(lesson(), "cross_entropy").result(timeout=SECONDS).loss


def test_a_state_is_restored(trainer):
    """load_state_with_optimizer goes on as if nothing had been between; load_state takes weights and step alone."""
    learn(trainer, 3)
    saved = trainer.save_state("three").result(timeout=SECONDS)
    assert saved.path == f"bt://loops:{trainer.run_id}/weights/three"
    went_on = learn(trainer, 3)
    restored = trainer.load_state_with_optimizer(saved.path).result(timeout=SECONDS)
    assert (restored.step, trainer.policy_version) == (3, 3)
    assert learn(trainer, 3) == pytest.approx(went_on, abs=1e-5)
    assert trainer.load_state(saved.path).result(timeout=SECONDS).step == trainer.policy_version == 3
    again = learn(trainer, 3)
    assert again[0] == pytest.approx(went_on[0], abs=1e-5)
    assert again[1:] != pytest.approx(went_on[1:], abs=1e-5)


@pytest.mark.parametrize("with_optimizer", [True, False])
async def test_a_new_run_takes_over(service, trainer, with_optimizer):
    """A run made from a state has its weights and its step, and goes on training; both faces."""
    learn(trainer, 3)
    path = (await (await trainer.save_state_async("handed-over"))).path
    wanted, suffix = loss(trainer), "_with_optimizer" if with_optimizer else ""
    blocking = getattr(service, f"create_training_client_from_state{suffix}")
    coroutine = getattr(service, f"create_training_client_from_state{suffix}_async")
    for other in (await coroutine(path), blocking(path)):
        assert other.run_id != trainer.run_id
        assert other.policy_version == 3
        assert learn(other, 2)[0] == pytest.approx(wanted, abs=1e-5)
        assert other.policy_version == 5
        other.close()


def test_checkpoints_are_listed(service, trainer):
    """Every kind is listed under its name, by the run and by the service; a name used again is there once a kind."""
    for _ in range(2):
        trainer.save_state("a").result(timeout=SECONDS)
    trainer.save_weights_for_sampler("b").result(timeout=SECONDS)
    trainer.save_state("passing", ttl_seconds=3600).result(timeout=SECONDS)
    listed = trainer.list_checkpoints()
    assert sorted(one.checkpoint_id for one in listed) == sorted(["a", "passing"] * kinds_saved() + ["b"])
    assert [one.id for one in service.list_checkpoints(trainer.run_id)] == [one.id for one in listed]
    for one in listed:
        assert (one.run_id, one.base_model, one.lora_adapter_config.rank) == (trainer.run_id, TINY, 8)
        assert one.size_bytes > 0


def test_an_archive_is_fetched(service, trainer):
    """The files of a checkpoint are behind addresses that need no key, page by page; the tensors are whole."""
    trainer.save_weights_for_sampler("archived").result(timeout=SECONDS)
    (checkpoint,) = trainer.list_checkpoints()
    files, token = [], 0
    while token is not None:
        page = service.get_checkpoint_archive_url(checkpoint.id, page_size=1, page_token=token)
        files, token = files + page.presigned_urls, page.next_page_token
    assert len(files) == page.total_count == len(trainer.get_checkpoint_archive_url(checkpoint.id).presigned_urls)
    got = {one.relative_file_name: httpx.get(one.url) for one in files}
    assert {one.relative_file_name: one.size_bytes for one in files} == {
        name: len(answer.content) for name, answer in got.items()
    }
    assert got["adapter/adapter_config.json"].json()["r"] == 8
    tensors = got["adapter/adapter_model.safetensors"].content
    length = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + length])
    ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    assert max(ends) == len(tensors) - 8 - length


def test_an_address_is_good_for_its_file_alone(trainer):
    """A signed address that was tampered with opens nothing."""
    trainer.save_state("signed").result(timeout=SECONDS)
    checkpoint = trainer.list_checkpoints()[0]
    url = urlsplit(trainer.get_checkpoint_archive_url(checkpoint.id).presigned_urls[0].url)
    forged = url._replace(path=url.path + "x").geturl()
    assert httpx.get(forged).status_code in {401, 403, 404}


def test_what_cannot_be_loaded_is_refused(trainer):
    """A published adapter is no state to resume from, and a name that was never used is none at all."""
    published = trainer.save_weights_for_sampler("served").result(timeout=SECONDS).path
    with pytest.raises(RemoteOpError, match="serves sampling"):
        trainer.load_state(published).result(timeout=SECONDS)
    with pytest.raises(RemoteOpError) as caught:
        trainer.load_state(f"bt://loops:{trainer.run_id}/weights/never").result(timeout=SECONDS)
    assert caught.value.error_class
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        trainer.create_sampling_client(f"bt://loops:{trainer.run_id}/sampler_weights/never")
