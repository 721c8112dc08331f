"""The half of ``tg-tinker artifacts`` that asks no server: opening artifacts, and the keys of a home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tg_tinker import home
from tg_tinker.cli import local_files
from tg_tinker.cli import output as out
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.server.settings import LOCAL_TENANT

if TYPE_CHECKING:
    from tg_tinker.store.keys import KeyProvider
    from tg_tinker.store.offline import Opened

__all__ = ["export_key", "export_peft", "open_artifact", "rotate_key"]

_home = click.option("--home", "folder", type=click.Path(path_type=Path), help="Instead of TG_TINKER_HOME.")
_tenant = click.option("--tenant", default=LOCAL_TENANT, show_default=True, help="Whose.")
_key = click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="A file of `artifacts export-key`; without it the keys of the home are taken.",
)


@click.command("open")
@click.argument("source")
@click.option("--output", "target", type=click.Path(path_type=Path), help="Write what is inside to this folder.")
@_key
@_home
@_tenant
@out.format_option
@out.advice_for_people
def open_artifact(
    source: str, target: Path | None, key: Path | None, folder: Path | None, tenant: str, output: str
) -> None:
    """Verify and decrypt SOURCE: a file of `artifacts pull`, or the id of an artifact of this home. No server is asked.

    What --output writes is no longer sealed.
    """
    opened = _opened(source, key, folder, tenant)
    if target is not None:
        _write_content(opened, target)
    header = opened.manifest["header"]
    told = {
        **{name: opened.manifest[name] for name in ("artifact_id", "tenant", "kind")},
        **{name: header[name] for name in ("run_id", "name", "step", "created_at", "expires_at", "privacy")},
        "metadata": header["metadata"],
        "key_id": opened.manifest["encryption"]["key_id"],
        "base_model": opened.counters.get("base_model"),
        "numbers": sum(array.size for array in opened.tensors.values()),
        "written_to": None if target is None else str(target),
    }
    shapes = {name: f"{array.dtype} {list(array.shape)}" for name, array in opened.tensors.items()}
    out.show_one({**told, "tensors": shapes if output == out.JSON else len(shapes)}, output)


@click.command("export-peft")
@click.argument("source")
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@_key
@_home
@_tenant
@out.format_option
@out.advice_for_people
def export_peft(source: str, target: Path, key: Path | None, folder: Path | None, tenant: str, output: str) -> None:
    """Write the adapter in SOURCE as a plain peft FOLDER, which PeftModel.from_pretrained loads. It is not sealed."""
    from tg_tinker.store import peft_export

    opened = _opened(source, key, folder, tenant)
    spec: dict[str, Any] | None = opened.counters.get("spec")
    if spec is None:
        raise InvalidRequestError(f"{source} holds no adapter", field="source", constraint="a saved training state")
    local_files.make_empty_folder(target)
    peft_export.export_peft(
        target,
        opened.tensors,
        base_model=opened.counters["base_model"],
        rank=spec["rank"],
        alpha=spec["alpha"],
        dropout=spec["dropout"],
        target_modules=spec["target_modules"],
    )
    done = {"folder": str(target), "step": opened.manifest["header"]["step"]}
    out.say("{folder} holds the adapter of step {step}", done, output)


@click.command("export-key")
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path))
@_home
@_tenant
@out.format_option
@out.advice_for_people
def export_key(target: Path, folder: Path | None, tenant: str, output: str) -> None:
    """Write a tenant's keys to FILE, which opens every artifact of that tenant, anywhere.

    Nothing is shown. The file is readable by you alone, and must not be there yet.
    """
    keys = _keys(home.folder(folder), tenant)
    local_files.write(target, keys.export(tenant), private=True)
    line = "{file} opens every artifact of tenant {tenant} that was sealed so far: keep it like the data"
    out.say(line, {"file": str(target), "tenant": tenant}, output)


@click.command("rotate-key")
@click.option("--rewrap-only", is_flag=True, help="Make no new key; after new TG_TINKER_MASTER_KEYS, for instance.")
@_home
@_tenant
@out.format_option
@out.advice_for_people
def rotate_key(folder: Path | None, tenant: str, output: str, *, rewrap_only: bool) -> None:
    """Seal with a new key from now on, and put every artifact there is under it; older pulled files open as before.

    A server over the same home goes on undisturbed.
    """
    from tg_tinker.store.checkpoints import CheckpointStore

    place = home.folder(folder)
    keys = _keys(place, tenant)
    key_id = keys.current(tenant) if rewrap_only else keys.rotate(tenant)
    count = CheckpointStore(place / "artifacts", keys).rewrap(tenant)
    line = "{key_id} is the key of tenant {tenant}; {rewrapped} artifacts were put under it"
    out.say(line, {"key_id": key_id, "tenant": tenant, "rewrapped": count}, output)
    if not rewrap_only:
        out.hint("key files exported before do not hold it: export again with `tg-tinker artifacts export-key`")


def _opened(source: str, key: Path | None, folder: Path | None, tenant: str) -> Opened:
    from tg_tinker.store import offline, sealing
    from tg_tinker.store.names import is_artifact_id

    place = home.folder(folder)
    at_home = is_artifact_id(source) and not Path(source).exists()
    data = b"" if at_home else local_files.read(Path(source))
    owner = tenant if at_home else sealing.unbundle(data)[0].identity.tenant
    instead = ", or give --key a file that `tg-tinker artifacts export-key` wrote there"
    opening = _keys(place, owner, instead).export(owner) if key is None else local_files.read(key)
    return offline.open_artifact(_stored(place, tenant, source) if at_home else data, opening)


def _stored(place: Path, tenant: str, artifact_id: str) -> bytes:
    """An artifact of the home, sealed; a home that is not there is not made by being asked."""
    from tg_tinker.store.checkpoints import CheckpointStore
    from tg_tinker.store.keys import provider_of

    if not place.is_dir():
        message = f"there is no {place}: name the --home whose server sealed {artifact_id}"
        raise ResourceNotFoundError(message, resource_type="home", resource_id=str(place))
    return CheckpointStore(place / "artifacts", provider_of(place)).pull(tenant, artifact_id)


def _keys(place: Path, tenant: str, instead: str = "") -> KeyProvider:
    """Where the home's keys come from; one that has none of the tenant's is not given any by being asked."""
    from tg_tinker.store.keys import provider_of

    if place.is_dir():
        keys = provider_of(place)
        if keys.holds(tenant):
            return keys
    message = (
        f"{place} holds no key of tenant {tenant}: name the --tenant, or the --home whose server sealed it{instead}"
    )
    raise ResourceNotFoundError(message, resource_type="key", resource_id=tenant)


def _write_content(opened: Opened, target: Path) -> None:
    import safetensors.numpy

    local_files.make_empty_folder(target)
    parts = {"manifest.json": opened.manifest, "counters.json": opened.counters}
    contents = {name: json.dumps(part, indent=2, sort_keys=True).encode() for name, part in parts.items()}
    contents["tensors.safetensors"] = safetensors.numpy.save(opened.tensors, {"format": "np"})
    for name, content in contents.items():
        local_files.write(target / name, content, private=True)
