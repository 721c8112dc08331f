"""Checkpoints are downloaded whole or not at all: from a real server, and from one that misbehaves in every way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.depot import Depot
from fixtures.programs import MODEL, datum

from tg_tinker import ServiceClient, loops
from tg_tinker.errors import (
    AuthorizationError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
    ServerUnreachableError,
)
from tg_tinker.loops import AdamParams

pytestmark = pytest.mark.timeout(240)
LONG = bytes(range(256)) * 4096  # 1 MiB


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------ from a real server


@pytest.fixture
def saved(trainer: loops.TrainingClient) -> str:
    """The URI of a checkpoint that holds moments."""
    trainer.forward_backward([datum()])
    trainer.optim_step(AdamParams(learning_rate=1e-2)).result(timeout=60)
    return trainer.save_state("kept").result(timeout=60).path


def test_a_checkpoint_comes_whole(
    service: ServiceClient, trainer: loops.TrainingClient, saved: str, tmp_path: Path
) -> None:
    """By URI, id, run and name, and from the run's own client: the same verified files, and progress to the end."""
    told: list[tuple[int, int]] = []
    found = service.download_checkpoint(saved, dest_dir=tmp_path / "uri", progress=lambda *both: told.append(both))
    files = tree(tmp_path / "uri")
    listed = trainer.get_checkpoint_archive_url("kept").presigned_urls
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == {
        one.relative_file_name: one.sha256 for one in listed
    }
    assert (found.dest_dir, found.file_count) == (str(tmp_path / "uri"), len(files))
    assert found.bytes_written == sum(map(len, files.values())) == told[-1][0]
    assert all(done <= total == found.bytes_written for done, total in told)
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == MODEL
    (checkpoint,) = trainer.list_checkpoints()
    run_id = str(trainer.run_id)
    service.download_checkpoint(checkpoint.id, dest_dir=str(tmp_path / "id"))
    service.download_checkpoint(name="kept", run_id=run_id, target="trainer", dest_dir=tmp_path / "name")
    trainer.download_checkpoint("kept", dest_dir=tmp_path / "run")
    trainer.download_checkpoint(name="kept", target="trainer", dest_dir=tmp_path / "run-name")
    assert all(tree(folder) == files for folder in tmp_path.iterdir())


def test_what_was_fetched_is_not_fetched_again(service: ServiceClient, saved: str, tmp_path: Path) -> None:
    """A broken download goes on from its bytes; a part of another checkpoint is found out and fetched afresh."""
    whole = service.download_checkpoint(saved, dest_dir=tmp_path).bytes_written
    files = tree(tmp_path)
    big = tmp_path / max(files, key=lambda name: len(files[name]))
    content = big.read_bytes()

    def left_behind(part: bytes) -> int:
        big.unlink(missing_ok=True)
        big.with_name(f"{big.name}.part").write_bytes(part)
        return service.download_checkpoint(saved, dest_dir=tmp_path).bytes_written

    assert left_behind(content[:1000]) == len(content) - 1000
    assert left_behind(content) == 0
    assert left_behind(content + b"more") == len(content)
    with pytest.raises(ServerError) as caught:
        left_behind(b"x" * 1000)
    assert caught.value.code == "BAD_FILE"
    assert service.download_checkpoint(saved, dest_dir=tmp_path).bytes_written == len(content)
    assert service.download_checkpoint(saved, dest_dir=tmp_path).bytes_written == 0
    assert tree(tmp_path) == files
    assert whole == sum(map(len, files.values()))


async def test_a_coroutine_downloads_and_goes_on_after_a_cancel(home: Path, tmp_path: Path) -> None:
    """The awaitable form; one that is broken off by its own progress function leaves parts that the next one takes."""
    async with loops.ServiceClient(home=home) as service:
        run = await service.create_lora_training_client_async(MODEL, 32, seed=1)
        saved = await (await run.save_state_async("kept"))

        def stop(done: int, total: int) -> None:
            if 0 < done < total:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            await run.download_checkpoint_async("kept", dest_dir=tmp_path, progress=stop)
        found = await service.download_checkpoint_async(saved.path, dest_dir=tmp_path)
        sizes = sum(map(len, tree(tmp_path).values()))
        assert 0 < found.bytes_written < sizes
        assert not [name for name in tree(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"checkpoint_id": "a", "dest_dir": 3}, "dest_dir"),
        ({"checkpoint_id": "a", "dest_dir": ""}, "dest_dir"),
        ({"dest_dir": "."}, "checkpoint_id"),
        ({"name": "a", "dest_dir": "."}, "run_id"),
        ({"checkpoint_id": "a", "target": "both", "dest_dir": "."}, "target"),
        ({"checkpoint_id": "a", "dest_dir": ".", "progress": 5}, "progress"),
    ],
)
def test_wrong_arguments_are_refused(service: ServiceClient, arguments: dict[str, Any], field: str) -> None:
    """Each argument is checked by name, before anything is fetched."""
    with pytest.raises(InvalidRequestError) as caught:
        service.download_checkpoint(**arguments)
    assert caught.value.field == field


def test_nothing_is_overwritten(service: ServiceClient, saved: str, tmp_path: Path) -> None:
    """A file of another content, a link, and a file where a folder should be, or the reverse, are left alone."""
    mine = tmp_path / "mine" / "adapter" / "adapter_config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "adapter").symlink_to(tmp_path / "mine")
    (tmp_path / "folders" / "adapter" / "adapter_config.json").mkdir(parents=True)
    for folder in (tmp_path / "mine", tmp_path / "folders", mine):
        with pytest.raises(InvalidRequestError) as caught:
            service.download_checkpoint(saved, dest_dir=folder)
        assert caught.value.field == "dest_dir"
    with pytest.raises(ServerError) as unsafe:
        service.download_checkpoint(saved, dest_dir=tmp_path / "linked")
    assert unsafe.value.code == "UNSAFE_NAME"
    assert mine.read_text() == "{}"
    with pytest.raises(ResourceNotFoundError):
        service.download_checkpoint("art-nowhere", dest_dir=tmp_path / "nowhere")


# ------------------------------------------------------------------------------- from one that misbehaves


@pytest.fixture
async def depot(tmp_path: Path) -> AsyncIterator[Depot]:
    """A server of one checkpoint of two files."""
    async with Depot({"a/long.bin": LONG, "short.txt": b"short"}, tmp_path) as depot:
        yield depot


@pytest.fixture
async def client(depot: Depot) -> AsyncIterator[loops.ServiceClient]:
    """A client of the depot, with a key."""
    async with loops.ServiceClient(base_url=depot.url, api_key="secret", retry_count=2) as client:
        yield client


async def test_a_broken_transfer_goes_on_where_it_broke(
    depot: Depot, client: loops.ServiceClient, tmp_path: Path
) -> None:
    """Each new request asks for the bytes that are missing; the keys of the service go to nobody's file server."""
    del depot.files["short.txt"]
    depot.breaks_after = [100_000, 200_000, 300_000]
    found = await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
    assert tree(tmp_path) == depot.files
    assert found.bytes_written == len(LONG)
    assert [asked for _, asked in depot.asked] == [None, "bytes=100000-", "bytes=300000-", "bytes=600000-"]
    assert depot.keys == {None}


async def test_a_server_without_ranges_sends_it_all_again(
    depot: Depot, client: loops.ServiceClient, tmp_path: Path
) -> None:
    """What had come is thrown away, and the file is right all the same."""
    depot.breaks_after, depot.ignores_ranges = [100_000, 5], True
    await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
    assert tree(tmp_path) == depot.files


async def test_a_server_that_gives_up_is_given_up(depot: Depot, client: loops.ServiceClient, tmp_path: Path) -> None:
    """Tries that bring nothing are counted; what had come before stays for the next time."""
    del depot.files["short.txt"]
    depot.breaks_after = [100_000, 0, 0, 0]
    with pytest.raises(ServerUnreachableError):
        await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
    assert len(depot.asked) == 4
    found = await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
    assert found.bytes_written == len(LONG) - 100_000
    assert tree(tmp_path) == depot.files


async def test_addresses_that_expire_are_asked_for_anew(
    depot: Depot, client: loops.ServiceClient, tmp_path: Path
) -> None:
    """A refused address is renewed once by a new listing; one that is refused again is the error that comes out."""
    depot.good_tokens = {"t1"}
    await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
    assert (depot.listings, tree(tmp_path)) == (2, depot.files)
    depot.good_tokens = set()
    with pytest.raises(AuthorizationError):
        await client.download_checkpoint_async("ckpt", dest_dir=tmp_path / "again")


@pytest.mark.parametrize("told", ["0" * 64, None])
async def test_a_digest_counts_where_it_is_told(
    depot: Depot, client: loops.ServiceClient, tmp_path: Path, told: str | None
) -> None:
    """A file of another digest than the one told never gets its name; servers that tell none are taken by the size."""
    depot.digests["a/long.bin"] = told
    if told is None:
        await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
        assert tree(tmp_path) == depot.files
        return
    with pytest.raises(ServerError) as caught:
        await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
    assert (caught.value.code, caught.value.details["file"]) == ("BAD_FILE", "a/long.bin")
    assert not (tmp_path / "a" / "long.bin").exists()


async def test_files_come_side_by_side_and_over_pages(
    depot: Depot, client: loops.ServiceClient, tmp_path: Path
) -> None:
    """Twenty files on seven pages: several at a time, never more than eight; empty ones are files as well."""
    depot.files = {f"part-{number:02}": b"x" * number for number in range(20)}
    depot.delay = 0.05
    found = await client.download_checkpoint_async("ckpt", dest_dir=tmp_path)
    assert (found.file_count, tree(tmp_path)) == (20, depot.files)
    assert 1 < depot.most_at_once <= 8


@pytest.mark.parametrize(
    "name",
    [
        "../out.bin",
        "a/../../out.bin",
        "/etc/out.bin",
        "a//b",
        "./a",
        "a/.",
        "",
        "C:\\out.bin",
        "C:out.bin",
        "a\\..\\..\\out.bin",
        "a\nb",
        "a\x00b",
        "..",
        "trailing.",
        "trailing ",
        "SHORT.TXT",
        "short.txt/inside",
        "short.txt.part",
        "a",
    ],
)
async def test_a_name_cannot_leave_the_folder(
    depot: Depot, client: loops.ServiceClient, tmp_path: Path, name: str
) -> None:
    """A name that is no plain relative one, or collides with another's, is refused; nothing at all is written."""
    depot.files[name] = b"hostile"
    folder = tmp_path / "inner" / "folder"
    with pytest.raises(ServerError) as caught:
        await client.download_checkpoint_async("ckpt", dest_dir=folder)
    assert caught.value.code == "UNSAFE_NAME"
    assert tree(tmp_path) == {}
    assert depot.asked == []
