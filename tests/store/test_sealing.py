"""The tamper matrix: whatever is changed, one of three errors, and never a byte of unverified plaintext."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, TGTinkerError
from tg_tinker.store import tink_aead
from tg_tinker.store.checkpoints import ArtifactRecord
from tg_tinker.store.keys import KeyFile
from tg_tinker.store.offline import open_artifact
from tg_tinker.store.sealing import MAGIC, Manifest, bundle
from tg_tinker.wire.digest import canonical_json, sha256_hex

DAMAGED, MISMATCH, UNKNOWN = "ARTIFACT_DAMAGED", "ARTIFACT_MISMATCH", "KEY_NOT_FOUND"


def code_of(action: Callable[[], object]) -> str:
    """Give the code of the typed error that an action ends in."""
    with pytest.raises(TGTinkerError) as caught:
        action()
    return caught.value.code


def flipped(content: bytes, position: int, bit: int = 1) -> bytes:
    """Change one bit."""
    changed = bytearray(content)
    changed[position] ^= bit
    return bytes(changed)


def forged(path: Path, **changes: object) -> None:
    """Rewrite fields of a stored manifest and make its checksum fit, as somebody without the key could."""
    fields = json.loads(path.read_bytes())
    del fields["checksum"]
    for name, value in changes.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    fields["checksum"] = sha256_hex(canonical_json(fields))
    path.write_bytes(canonical_json(fields))


@pytest.mark.parametrize("bit", [1, 128])
def test_every_flipped_bit_of_a_pulled_artifact_is_found(vault, bit: int) -> None:
    """Flipping a bit of any byte, from the magic line to the last tag, ends in a typed error."""
    data = vault.store.pull("acme", vault.save(tensors={"a": np.float32([1.0])}).artifact_id)
    key = vault.keys.export("acme")
    codes = {code_of(lambda at=at: open_artifact(flipped(data, at, bit), key)) for at in range(len(data))}
    assert codes == {DAMAGED}


def test_every_truncation_is_found(vault) -> None:
    """A pulled artifact that ends early, at any byte, or goes on too long is damaged."""
    data = vault.store.pull("acme", vault.save(tensors={"a": np.float32([1.0])}).artifact_id)
    key = vault.keys.export("acme")
    shorter = {code_of(lambda end=end: open_artifact(data[:end], key)) for end in range(len(data))}
    assert shorter == {DAMAGED}
    assert code_of(lambda: open_artifact(data + b"\0", key)) == DAMAGED


def test_truncation_at_a_segment_boundary_is_found(vault) -> None:
    """A ciphertext cut exactly between two segments is damaged even if the manifest is made to agree."""
    record = vault.save(tensors={"a": np.zeros(1 << 20, np.float32)})
    manifest, ciphertext = vault.files(record)
    ciphertext.write_bytes(ciphertext.read_bytes()[: 1 << 20])
    assert code_of(lambda: vault.store.load("acme", record.artifact_id)) == DAMAGED
    forged(manifest, ciphertext_bytes=1 << 20)
    assert code_of(lambda: vault.store.load("acme", record.artifact_id)) == DAMAGED


def test_the_size_is_checked_first(vault) -> None:
    """A wrong size is reported as such before any key is asked for."""
    record = vault.save()
    _, ciphertext = vault.files(record)
    ciphertext.write_bytes(b"")
    vault.keys.erase("acme")
    assert code_of(lambda: vault.store.load("acme", record.artifact_id)) == DAMAGED


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"step": 4}},
        {"header": {"metadata": {"epoch": 6}}},
        {"header": {"run_id": "run-2"}},
        {"header": {"expires_at": "2999-01-01T00:00:00+00:00"}},
        {"header": {"extra": 1}},
    ],
)
def test_readable_fields_cannot_be_changed(vault, change: dict[str, object]) -> None:
    """Every field of the header is authenticated, though anybody can read it: changing one is damage."""
    record = vault.save()
    forged(vault.files(record)[0], **change)
    assert code_of(lambda: vault.store.load("acme", record.artifact_id)) == DAMAGED


@pytest.mark.parametrize("change", [{"kind": "weights"}, {"tenant": "other"}, {"artifact_id": "art-" + "0" * 32}])
def test_an_identity_cannot_be_changed(vault, change: dict[str, object]) -> None:
    """A key that was wrapped for one (tenant, artifact, kind) opens no other: that is a mismatch, not damage."""
    record = vault.save()
    forged(vault.files(record)[0], **change)
    assert code_of(lambda: vault.store.load("acme", record.artifact_id)) == MISMATCH


def swap(vault, first: ArtifactRecord, second: ArtifactRecord, part: int) -> None:
    """Put one file of each artifact in the place of the other's."""
    one, other = vault.files(first)[part], vault.files(second)[part]
    content, others = one.read_bytes(), other.read_bytes()
    one.write_bytes(others)
    other.write_bytes(content)


def test_an_artifact_in_the_place_of_another_is_a_mismatch(vault) -> None:
    """Both files of two artifacts swapped: each is authentic and neither is the one that was asked for."""
    first, second = vault.save(), vault.save()
    swap(vault, first, second, 0)
    swap(vault, first, second, 1)
    for record in (first, second):
        assert code_of(lambda record=record: vault.store.load("acme", record.artifact_id)) == MISMATCH
        assert code_of(lambda record=record: vault.store.pull("acme", record.artifact_id)) == MISMATCH


def test_rotation_leaves_what_lies_in_another_place_alone(vault) -> None:
    """Swapped files are passed over, so that they can be swapped back; listings leave them out."""
    first, second = vault.save(), vault.save()
    for part in (0, 1):
        swap(vault, first, second, part)
    vault.keys.rotate("acme")
    assert vault.store.rewrap("acme") == 0
    assert list(vault.store.list("acme")) == []
    for part in (0, 1):
        swap(vault, first, second, part)
    assert [vault.store.load("acme", one.artifact_id).record for one in (first, second)] == [first, second]


def test_swapped_contents_are_damage(vault) -> None:
    """The ciphertext of another artifact, equal in size, does not open with this one's key."""
    first, second = vault.save(), vault.save()
    swap(vault, first, second, 1)
    assert code_of(lambda: vault.store.load("acme", first.artifact_id)) == DAMAGED


def test_a_swapped_key_is_a_mismatch(vault) -> None:
    """The wrapped key of another artifact in an otherwise untouched manifest is told as such."""
    first, second = vault.save(), vault.save()
    other = json.loads(vault.files(second)[0].read_bytes())["encryption"]
    forged(vault.files(first)[0], encryption=other)
    assert code_of(lambda: vault.store.load("acme", first.artifact_id)) == MISMATCH


def test_an_artifact_moved_to_another_tenant_stays_shut(vault) -> None:
    """A tenant who gets hold of another's files has no key for them, whatever their manifest is made to say."""
    record, bait = vault.save("acme"), vault.save("mallory")
    place = vault.files(bait)[0].parent
    for path in vault.files(record):
        path.rename(place / path.name)
    assert code_of(lambda: vault.store.load("mallory", record.artifact_id)) == UNKNOWN
    assert code_of(lambda: vault.store.pull("mallory", record.artifact_id)) == UNKNOWN
    forged(place / f"{record.artifact_id}.json", tenant="mallory")
    assert code_of(lambda: vault.store.load("mallory", record.artifact_id)) == UNKNOWN


def test_a_wrong_key_is_unknown(vault, tmp_path: Path) -> None:
    """Somebody else's key file, or one made after erasure, does not hold the key id."""
    data = vault.store.pull("acme", vault.save().artifact_id)
    stranger = KeyFile(tmp_path / "elsewhere").export("acme")
    assert code_of(lambda: open_artifact(data, stranger)) == UNKNOWN
    vault.keys.erase("acme")
    assert code_of(lambda: open_artifact(data, vault.keys.export("acme"))) == UNKNOWN


@pytest.mark.parametrize("size", [10, 5 << 20])
def test_a_full_disk_is_an_os_error(size: int) -> None:
    """When the ciphertext cannot be written, the plain OSError comes out, and nothing is printed later."""
    with pytest.raises(OSError, match="No space left"):
        tink_aead.encrypt_stream(tink_aead.new_stream_keyset(), bytes(size), Path("/dev/full"), b"")
    gc.collect()


ENDLESS = b"""{"header": {}, "encryption": {"key_id": "", "wrapped_key": ""}, "ciphertext_bytes": Infinity,
"tenant": "", "artifact_id": "", "kind": ""}"""


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"[1]", b"\xff\xfe", b'{"checksum":1}', b"[" * 5000, ENDLESS])
def test_what_is_no_manifest_is_damage(content: bytes) -> None:
    """Any bytes in place of a manifest are damage, not a traceback."""
    assert code_of(lambda: Manifest.from_bytes(content)) == DAMAGED


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_a_lying_length_is_damage(vault, length: int) -> None:
    """A manifest length that does not fit the bytes is found before anything is read by it."""
    data = MAGIC + length.to_bytes(8, "little") + b"{}"
    assert code_of(lambda: open_artifact(data, vault.keys.export("acme"))) == DAMAGED


@pytest.mark.parametrize("key_id", [None, 7, ["kek-1"], {"id": "kek-1"}])
def test_a_key_id_that_is_no_text_is_damage(vault, key_id: object) -> None:
    """Whatever somebody without the key writes in place of the key's id, it is damage, not a traceback."""
    record = vault.save()
    forged(vault.files(record)[0], encryption={"key_id": key_id})
    assert code_of(lambda: vault.store.load("acme", record.artifact_id)) == DAMAGED


@pytest.mark.parametrize(
    "change",
    [
        {"created_at": None},
        {"privacy": ...},
        {"created_at": "2026-01-02T03:04:05"},
        {"expires_at": "2026-01-02T03:04:05"},
        {"step": "?"},
        {"name": 5},
        {"run_id": None},
        {"metadata": []},
        {"privacy": "none"},
    ],
)
def test_a_manifest_of_other_fields_is_damage(vault, change: dict[str, object]) -> None:
    """A forged manifest that lacks what a listing shows is refused; listings and sweeps pass over it alone."""
    record, other = vault.save(), vault.save()
    path = vault.files(record)[0]
    manifest = Manifest.from_bytes(path.read_bytes())
    header = {name: value for name, value in (manifest.header | change).items() if value is not ...}
    path.write_bytes(Manifest(manifest.identity, header, manifest.wrapped, manifest.ciphertext_bytes).to_bytes())
    for action in (vault.store.get, vault.store.load, vault.store.pull):
        assert code_of(lambda action=action: action("acme", record.artifact_id)) == DAMAGED
    assert list(vault.store.list("acme")) == [other]
    assert vault.store.sweep(other.created_at) == 0


def test_a_bundle_is_magic_length_manifest_ciphertext(vault) -> None:
    """The pulled format is what the documentation says, byte for byte."""
    record = vault.save()
    manifest, ciphertext = (path.read_bytes() for path in vault.files(record))
    data = vault.store.pull("acme", record.artifact_id)
    assert data == b"tg-artifact/1\n" + len(manifest).to_bytes(8, "little") + manifest + ciphertext
    assert data == bundle(Manifest.from_bytes(manifest), ciphertext)


def test_typed_errors_are_the_documented_ones(vault) -> None:
    """An unknown key is a missing resource; mismatch and damage are invalid requests about the artifact."""
    data = vault.store.pull("acme", vault.save().artifact_id)
    with pytest.raises(ResourceNotFoundError) as unknown:
        open_artifact(data, vault.keys.export("other"))
    assert unknown.value.resource_type == "key"
    with pytest.raises(InvalidRequestError) as damage:
        open_artifact(data[:-1], vault.keys.export("acme"))
    assert damage.value.field == "artifact"
