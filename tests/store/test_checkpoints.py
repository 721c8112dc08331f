from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.store import container
from tg_tinker.store.checkpoints import CheckpointStore
from tg_tinker.store.index import ORPHAN_AGE

BAD_IDS = ["", "art-", "art-xyz", "../../etc/passwd", "art-" + "0" * 31, "art-" + "0" * 32 + "\n", "art-" + "G" * 32]


def test_what_is_saved_is_loaded(vault) -> None:
    """Tensors come back bit for bit in their own dtype and shape, counters as they were."""
    tensors = {
        "weights": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "step": torch.tensor(7, dtype=torch.int64),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "array": np.float64([[1.5]]),
        "empty": torch.zeros(0, 3),
    }
    record = vault.save(tensors=tensors, counters={"step": 7, "text": "é"})
    loaded = vault.store.load("acme", record.artifact_id)
    assert loaded.record == record
    assert loaded.counters == {"step": 7, "text": "é"}
    assert loaded.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        expected = torch.as_tensor(value)
        assert loaded.tensors[name].dtype == expected.dtype
        assert torch.equal(loaded.tensors[name], expected)


def test_the_inside_is_reproducible() -> None:
    """Equal states give equal bytes, whatever order they are given in."""
    one = container.pack({"a": torch.ones(2), "b": torch.zeros(3)}, {"x": 1, "y": [2.5]})
    other = container.pack({"b": torch.zeros(3), "a": torch.ones(2)}, {"y": [2.5], "x": 1})
    assert one == other


def test_nothing_readable_is_stored_but_the_manifest(vault) -> None:
    """Neither tensors nor counters appear in the files, and equal states give different ciphertexts."""
    secret = np.frombuffer(b"a very recognisable secret value" * 4, np.float32)
    records = [vault.save(tensors={"a": secret}, counters={"note": "whispered"}) for _ in range(2)]
    contents = [path.read_bytes() for record in records for path in vault.files(record)]
    assert not any(b"recognisable" in content or b"whispered" in content for content in contents)
    assert contents[1] != contents[3]


def test_a_record_tells_how_it_is_sealed(vault) -> None:
    """The record holds the fields of the result: id, size at rest, cipher, key id, format, metadata, UTC time."""
    record = vault.save(privacy={"unit": "one row of a batch", "epsilon": 1.5})
    assert record.size_bytes == vault.files(record)[1].stat().st_size
    assert record.encryption.algorithm == "AES-256-GCM"
    assert record.encryption.key_id == vault.keys.current("acme")
    assert record.encryption.format == "tink/AES256_GCM_HKDF_1MB"
    assert (record.step, record.metadata, record.kind) == (3, {"epoch": 5}, "tg_state")
    assert record.privacy == {"unit": "one row of a batch", "epsilon": 1.5}
    assert record.created_at.utcoffset() == timedelta(0)


def test_artifacts_survive_a_restart(vault) -> None:
    """A new store over the same folder loads and lists what the old one saved."""
    record = vault.save()
    again = CheckpointStore(vault.folder / "artifacts", vault.keys)
    assert again.load("acme", record.artifact_id).record == record
    assert list(again.list("acme")) == [record]


def test_rotation_keeps_every_artifact_readable(vault) -> None:
    """After two rotations, with and without re-wrapping, all artifacts open, and pulled copies with an old key too."""
    first = vault.save()
    pulled = vault.store.pull("acme", first.artifact_id)
    vault.keys.rotate("acme")
    second = vault.save()
    vault.keys.rotate("acme")
    for record in (first, second):
        vault.store.load("acme", record.artifact_id)
    contents = [vault.files(record)[1].read_bytes() for record in (first, second)]
    assert vault.store.rewrap("acme") == 2
    assert vault.store.rewrap("acme") == 0
    for record, content in zip((first, second), contents, strict=True):
        assert vault.store.load("acme", record.artifact_id).record.encryption.key_id == vault.keys.current("acme")
        assert vault.files(record)[1].read_bytes() == content
    assert pulled != vault.store.pull("acme", first.artifact_id)


def test_a_name_finds_the_newest_checkpoint_of_its_kind(vault) -> None:
    """Names are per run and kind; saving under a name again makes the newer one answer to it."""
    vault.save(name="best", kind="weights")
    newest = vault.save(name="best", kind="weights")
    vault.save(name="best", kind="sampler_weights")
    vault.save(name="best", kind="weights", run_id="run-2")
    assert vault.store.find("acme", "run-1", "weights", "best") == newest
    with pytest.raises(ResourceNotFoundError) as caught:
        vault.store.find("acme", "run-1", "weights", "worst")
    assert (caught.value.code, caught.value.resource_id) == ("CHECKPOINT_NOT_FOUND", "worst")


def test_lists_are_by_tenant_and_run_oldest_first(vault) -> None:
    """A tenant sees its own artifacts only, all of them or those of one run, in the order of saving."""
    records = [vault.save(run_id=run) for run in ("run-1", "run-2", "run-1")]
    vault.save("other")
    assert list(vault.store.list("acme")) == records
    assert list(vault.store.list("acme", "run-1")) == [records[0], records[2]]
    assert list(vault.store.list("nobody")) == []


@pytest.mark.parametrize("action", ["load", "get", "pull", "delete"])
def test_a_foreign_artifact_is_not_there(vault, action: str) -> None:
    """Another tenant's id answers exactly as one that does not exist."""
    record = vault.save()
    errors = []
    for artifact_id in (record.artifact_id, "art-" + "0" * 32):
        with pytest.raises(ResourceNotFoundError) as caught:
            getattr(vault.store, action)("other", artifact_id)
        errors.append((caught.value.code, caught.value.message.replace(artifact_id, "ID")))
    assert errors[0] == errors[1] == ("ARTIFACT_NOT_FOUND", "no such artifact: 'ID'")


@pytest.mark.parametrize("artifact_id", BAD_IDS)
def test_an_id_is_never_made_into_a_path(vault, artifact_id: str) -> None:
    """What does not look like an id is not found, without touching the file system."""
    with pytest.raises(ResourceNotFoundError):
        vault.store.load("acme", artifact_id)


@pytest.mark.parametrize("bad", ["", "..", "a/b", "-x", "x\n", "x" * 129, "a b", "é"])
@pytest.mark.parametrize("field", ["tenant", "run_id", "name"])
def test_names_are_labels(vault, field: str, bad: str) -> None:
    """Tenant, run and checkpoint names must be labels; the error names the field, and nothing is stored."""
    with pytest.raises(InvalidRequestError) as caught:
        vault.save(**{field: bad})
    assert caught.value.field == field
    assert not list((vault.folder / "artifacts").rglob("*.*"))


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": object()}, {"a": b""}, {"a": "x" * (1 << 20)}])
def test_metadata_is_json_of_bounded_size(vault, metadata: dict[str, object]) -> None:
    """Metadata that is no JSON, or too much of it, is refused before anything is written."""
    with pytest.raises(InvalidRequestError) as caught:
        vault.save(metadata=metadata)
    assert caught.value.field == "metadata"


def test_an_unknown_kind_is_refused(vault) -> None:
    """There are three kinds of artifacts."""
    with pytest.raises(InvalidRequestError) as caught:
        vault.save(kind="pickle")
    assert caught.value.field == "kind"


def test_a_deleted_artifact_is_gone(vault) -> None:
    """After deletion nothing of it is left, and its neighbours are untouched."""
    record, kept = vault.save(), vault.save()
    paths = vault.files(record)
    vault.store.delete("acme", record.artifact_id)
    assert not any(path.exists() for path in paths)
    assert list(vault.store.list("acme")) == [kept]


def test_time_to_live_ends(vault) -> None:
    """An expired artifact is not found any more, and the sweep removes its files and no others."""
    record = vault.save(name="best")
    fleeting = vault.save(name="best", expires_at=record.created_at + timedelta(microseconds=1))
    lasting = vault.save("other", expires_at=record.created_at + timedelta(days=1))
    with pytest.raises(ResourceNotFoundError):
        vault.store.load("acme", fleeting.artifact_id)
    assert vault.store.find("acme", "run-1", "tg_state", "best") == record
    paths = vault.files(fleeting)
    assert vault.store.sweep(record.created_at + timedelta(hours=1)) == 1
    assert not any(path.exists() for path in paths)
    assert vault.store.sweep(record.created_at + timedelta(days=2)) == 1
    assert list(vault.store.list("other")) == []
    assert lasting.artifact_id not in {path.stem for path in vault.folder.rglob("*")}


def test_orphans_are_swept_when_a_store_opens(vault) -> None:
    """What a crash left half written is removed once it is old; young files may be another server's save."""
    record = vault.save()
    manifest, ciphertext = vault.files(record)
    old = ciphertext.with_name("art-" + "1" * 32 + ".sealed")
    young = ciphertext.with_name("art-" + "2" * 32 + ".sealed")
    temporary = ciphertext.with_name(".art.0000.tmp")
    for path in (old, young, temporary):
        path.write_bytes(b"half")
    past = time.time() - ORPHAN_AGE - 60
    for path in (old, temporary, manifest, ciphertext):
        os.utime(path, (past, past))
    CheckpointStore(vault.folder / "artifacts", vault.keys)
    assert not old.exists()
    assert not temporary.exists()
    assert young.exists()
    vault.store.load("acme", record.artifact_id)


def test_an_artifact_exists_once_its_manifest_does(vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that dies before the manifest leaves nothing that is listed, and no temporary file."""

    def dies(path: Path, content: bytes) -> None:
        raise OSError(path.name, content)

    monkeypatch.setattr("tg_tinker.store.files.write", dies)
    with pytest.raises(OSError, match="art-"):
        vault.save()
    assert list(vault.store.list("acme")) == []
    assert not list(vault.folder.rglob("*.tmp"))


def test_every_rename_follows_a_sync(vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files are synced before they are renamed, their folder afterwards, and the manifest comes last."""
    events: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        events.append("sync")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(target.suffix)
        return real_replace(self, target)

    vault.save()
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    vault.save()
    assert events == ["sync", ".sealed", "sync", "sync", ".json", "sync"]


def test_concurrent_saves_do_not_disturb_each_other(vault) -> None:
    """Many threads saving, rotating and re-wrapping at once lose nothing."""

    def work(number: int) -> str:
        if number % 5 == 0:
            vault.keys.rotate("acme")
            vault.store.rewrap("acme")
        return vault.save(step=number).artifact_id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(work, range(20)))
    assert {record.artifact_id for record in vault.store.list("acme")} == set(ids)
    assert sorted(vault.store.load("acme", artifact_id).record.step for artifact_id in ids) == list(range(20))


def test_what_does_not_open_is_in_nobodys_way(vault, caplog: pytest.LogCaptureFixture) -> None:
    """Rotation passes over an artifact whose key is gone, and says so; the others come under the new key."""
    lost = vault.save()
    vault.keys.erase("acme")
    kept = [vault.save(), vault.save()]
    vault.keys.rotate("acme")
    assert vault.store.rewrap("acme") == 2
    assert lost.artifact_id in caplog.text
    assert {vault.store.get("acme", one.artifact_id).encryption.key_id for one in kept} == {vault.keys.current("acme")}


def test_a_damaged_artifact_can_be_deleted(vault) -> None:
    """What no longer reads can be removed like any other artifact, and only by its owner."""
    record = vault.save()
    vault.files(record)[0].write_bytes(b"{}")
    with pytest.raises(ResourceNotFoundError):
        vault.store.delete("other", record.artifact_id)
    vault.store.delete("acme", record.artifact_id)
    assert not list((vault.folder / "artifacts").rglob("art-*"))
    with pytest.raises(ResourceNotFoundError):
        vault.store.delete("acme", record.artifact_id)


def test_a_missing_content_is_damage(vault) -> None:
    """An artifact whose ciphertext file is gone is damaged, for loading and for pulling alike."""
    record = vault.save()
    vault.files(record)[1].unlink()
    for action in (vault.store.load, vault.store.pull):
        with pytest.raises(InvalidRequestError) as caught:
            action("acme", record.artifact_id)
        assert caught.value.code == "ARTIFACT_DAMAGED"


def test_a_listing_survives_a_deletion_under_its_eyes(vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that disappears between looking and reading is left out."""
    records = [vault.save(), vault.save()]
    gone, real = vault.files(records[0])[0], Path.read_bytes

    def read(self: Path) -> bytes:
        if self == gone:
            raise FileNotFoundError(self.name)
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert list(vault.store.list("acme")) == [records[1]]
