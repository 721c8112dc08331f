from __future__ import annotations

import base64
import json
import multiprocessing
from pathlib import Path

import pytest

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.store import files
from tg_tinker.store.keyring import KeyRing
from tg_tinker.store.keys import VARIABLE, KeyEnvironment, KeyFile, provider_of
from tg_tinker.store.tink_aead import UnauthenticError


def key_text(byte: int) -> str:
    """Write a 32-byte master key as the environment holds it."""
    return base64.b64encode(bytes([byte]) * 32).decode()


def test_a_key_file_is_made_once_and_kept(tmp_path: Path) -> None:
    """A second provider over the same folder has the same key: nothing is ever thrown away."""
    first = KeyFile(tmp_path).current("acme")
    assert KeyFile(tmp_path).current("acme") == first


def test_key_files_are_private(tmp_path: Path) -> None:
    """A key file has mode 0600, and one that others may read is refused."""
    keys = KeyFile(tmp_path)
    keys.current("acme")
    (path,) = tmp_path.glob("*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        keys.current("acme")


def test_no_file_name_holds_user_text(tmp_path: Path) -> None:
    """A tenant's name is no part of a path, and a name that is no label is refused."""
    keys = KeyFile(tmp_path)
    keys.current("Tenant.Name")
    assert not any("enant" in path.name for path in tmp_path.iterdir())
    for bad in ("", "..", "../x", "a/b", "name\n", "-a", "a" * 129, "a\0"):
        with pytest.raises(InvalidRequestError) as caught:
            keys.current(bad)
        assert caught.value.field == "tenant"


def test_wrapping_is_bound_to_its_associated_data(tmp_path: Path) -> None:
    """A wrapped keyset opens with the same associated data and with no other."""
    keys = KeyFile(tmp_path)
    wrapped = keys.wrap("acme", b"keyset", b"this artifact")
    assert wrapped.key_id == keys.current("acme")
    assert keys.unwrap("acme", wrapped.key_id, wrapped.ciphertext, b"this artifact") == b"keyset"
    with pytest.raises(UnauthenticError):
        keys.unwrap("acme", wrapped.key_id, wrapped.ciphertext, b"another artifact")


def test_rotation_keeps_every_older_key(tmp_path: Path) -> None:
    """After three rotations, what each of the four keys wrapped still opens."""
    keys = KeyFile(tmp_path)
    wrapped = [keys.wrap("acme", b"0", b"")]
    for number in range(1, 4):
        assert keys.rotate("acme") == keys.current("acme")
        wrapped.append(keys.wrap("acme", str(number).encode(), b""))
    assert len({one.key_id for one in wrapped}) == 4
    opened = [keys.unwrap("acme", one.key_id, one.ciphertext, b"") for one in wrapped]
    assert opened == [b"0", b"1", b"2", b"3"]


def test_a_key_belongs_to_one_tenant(tmp_path: Path) -> None:
    """Another tenant's key id is unknown, by name and without a traceback of the crypto library."""
    keys = KeyFile(tmp_path)
    wrapped = keys.wrap("acme", b"keyset", b"")
    with pytest.raises(ResourceNotFoundError) as caught:
        keys.unwrap("other", wrapped.key_id, wrapped.ciphertext, b"")
    assert (caught.value.code, caught.value.resource_id) == ("KEY_NOT_FOUND", wrapped.key_id)


def test_erasing_makes_old_keys_unknown(tmp_path: Path) -> None:
    """After erasure the old key id is gone and a new key takes over."""
    keys = KeyFile(tmp_path)
    wrapped = keys.wrap("acme", b"keyset", b"")
    keys.erase("acme")
    with pytest.raises(ResourceNotFoundError):
        keys.unwrap("acme", wrapped.key_id, wrapped.ciphertext, b"")
    assert keys.current("acme") != wrapped.key_id


def test_opening_makes_no_key(tmp_path: Path) -> None:
    """Where a key file was lost, opening says so and puts none in its place: the lost one may be brought back."""
    keys = KeyFile(tmp_path)
    wrapped = keys.wrap("acme", b"keyset", b"")
    (file,) = tmp_path.glob("*.json")
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(ResourceNotFoundError):
        keys.unwrap("acme", wrapped.key_id, wrapped.ciphertext, b"")
    assert not keys.holds("acme")
    files.write(file, content)
    assert keys.unwrap("acme", wrapped.key_id, wrapped.ciphertext, b"") == b"keyset"


@pytest.mark.parametrize("action", ["erase", "rotate"])
def test_no_half_written_file_outlives_its_keys(tmp_path: Path, action: str) -> None:
    """What a process that was killed left beside the key file goes with the next change: it holds keys, too."""
    keys = KeyFile(tmp_path)
    keys.current("acme")
    (file,) = tmp_path.glob("*.json")
    (tmp_path / f".{file.name}.0123456789abcdef.tmp").write_bytes(file.read_bytes())
    getattr(keys, action)("acme")
    assert not list(tmp_path.glob(".*.tmp"))


def _current(folder: Path) -> str:
    return KeyFile(folder).current("acme")


def _rotate(folder: Path) -> str:
    return KeyFile(folder).rotate("acme")


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    """Several servers over one folder make one key between them, and lose none when they rotate at once."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_current, [tmp_path] * 4))) == 1
        rotated = set(pool.map(_rotate, [tmp_path] * 4))
    assert len(rotated) == 4
    assert rotated < set(KeyRing.from_bytes(KeyFile(tmp_path).export("acme")).keys)


def test_the_environment_gives_each_tenant_its_own_key() -> None:
    """Keys derived from one master key differ by tenant, and the master key is in no export."""
    keys = KeyEnvironment(environment={VARIABLE: key_text(1)})
    assert keys.current("acme") != keys.current("other")
    assert key_text(1).encode() not in keys.export("acme")


def test_a_master_key_in_front_rotates() -> None:
    """A new master key in front becomes current; what the older one wrapped still opens."""
    old = KeyEnvironment(environment={VARIABLE: key_text(1)})
    wrapped = old.wrap("acme", b"keyset", b"aad")
    new = KeyEnvironment(environment={VARIABLE: f"{key_text(2)},{key_text(1)}"})
    assert new.current("acme") != wrapped.key_id
    assert new.unwrap("acme", wrapped.key_id, wrapped.ciphertext, b"aad") == b"keyset"


def test_a_home_takes_its_keys_from_the_environment_where_it_has_any(tmp_path: Path) -> None:
    """The variable decides, a malformed one is refused, and asking whether there is a key makes none."""
    assert isinstance(provider_of(tmp_path, {VARIABLE: key_text(1)}), KeyEnvironment)
    with pytest.raises(InvalidRequestError, match=VARIABLE):
        provider_of(tmp_path, {VARIABLE: ""})
    keys = provider_of(tmp_path, {})
    assert not keys.holds("acme")
    keys.current("acme")
    assert keys.holds("acme")
    assert (tmp_path / "keys").is_dir()


@pytest.mark.parametrize("text", ["", "short", key_text(1)[:-4], f"{key_text(1)},", "!" * 44])
def test_a_bad_master_key_is_refused_without_being_shown(text: str) -> None:
    """A variable that is missing or malformed is refused by its name; the value never appears."""
    with pytest.raises(InvalidRequestError) as caught:
        KeyEnvironment(environment={VARIABLE: text} if text else {})
    assert caught.value.field == VARIABLE
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize("action", ["rotate", "erase"])
def test_the_environment_is_changed_by_its_operator_alone(action: str) -> None:
    """Rotating or erasing keys that come from the environment is refused, not pretended."""
    with pytest.raises(InvalidRequestError, match=VARIABLE):
        getattr(KeyEnvironment(environment={VARIABLE: key_text(1)}), action)("acme")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"format":"other","keys":[],"tenant":"a"}',
        json.dumps({"format": "tg-keys/1", "tenant": "a", "keys": []}).encode(),
        json.dumps({"format": "tg-keys/1", "tenant": "a", "keys": ["AAAA"]}).encode(),
    ],
)
def test_what_is_no_key_file_is_refused(content: bytes) -> None:
    """Anything but a key file is an error in the field "key"."""
    with pytest.raises(InvalidRequestError) as caught:
        KeyRing.from_bytes(content)
    assert caught.value.field == "key"


def test_keys_are_not_shown(tmp_path: Path) -> None:
    """The repr of a key ring names ids, never key material."""
    ring = KeyRing.from_bytes(KeyFile(tmp_path).export("acme"))
    (key,) = ring.keys.values()
    assert repr(key) not in repr(ring)
    assert ring.current in repr(ring)
