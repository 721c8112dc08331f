"""``tg-tinker artifacts``: the sealed checkpoints of a server. Opening them and their keys are in ``vault``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tg_tinker.cli import local_files, vault
from tg_tinker.cli import output as out
from tg_tinker.cli.connection import connected, server_options

if TYPE_CHECKING:
    from tg_tinker import ArtifactInfo, ServiceClient

__all__ = ["command"]

_COLUMNS = {
    "artifact_id": "Artifact",
    "kind": "Kind",
    "name": "Name",
    "step": "Step",
    "size": "Size",
    "created": "Saved",
    "training_client_id": "Run",
}
_LISTED = 1000  # artifacts among which a pull looks for the size it is about to fetch


@click.group("artifacts")
def command() -> None:
    """List, pull, open and delete sealed checkpoints, and look after their keys.

    ls, pull and rm ask a server; the others work on files and on the home alone.
    """


for _offline in (vault.open_artifact, vault.export_peft, vault.export_key, vault.rotate_key):
    command.add_command(_offline)


@command.command("ls")
@click.option("--run", metavar="RUN", help="Only what was saved from this run.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@server_options
@out.format_option
@out.advice_for_people
def list_artifacts(run: str | None, limit: int, base_url: str | None, api_key: str | None, output: str) -> None:
    """List the artifacts, newest first."""
    with connected(base_url, api_key) as service:
        artifacts = service.list_artifacts(run, limit)
    out.show_rows([one.to_dict() if output == out.JSON else _row(one) for one in artifacts], _COLUMNS, output)


@command.command("pull")
@click.argument("artifact")
@click.option("--output", "target", type=click.Path(path_type=Path), help="The file to write; else ARTIFACT.tgart.")
@server_options
@out.format_option
@out.advice_for_people
def pull_artifact(artifact: str, target: Path | None, base_url: str | None, api_key: str | None, output: str) -> None:
    """Fetch ARTIFACT as it lies at the server, sealed; `tg-tinker artifacts open` opens it with the key."""
    target = target or Path(f"{Path(artifact).name}.tgart")
    local_files.refuse_existing(target)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = out.talk()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("asking the server", total=None)
        with connected(base_url, api_key, lambda text: display.update(task, description=text)) as service:
            display.update(task, total=_size(service, artifact))
            content = service.pull_artifact(
                artifact, progress=lambda done: display.update(task, description=artifact, completed=done)
            )
    local_files.write(target, content)
    done = {"artifact_id": artifact, "file": str(target), "size_bytes": len(content), "size": _megabytes(len(content))}
    out.say("{file}: {size}, sealed", done, output)


@command.command("rm")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@server_options
@out.format_option
@out.advice_for_people
def remove_artifacts(
    artifacts: tuple[str, ...], base_url: str | None, api_key: str | None, output: str, *, yes: bool
) -> None:
    """Delete each ARTIFACT for good."""
    if not yes:
        click.confirm(f"Delete {', '.join(artifacts)} for good?", abort=True, err=True)
    gone: list[dict[str, Any]] = []
    with connected(base_url, api_key) as service:
        try:
            for artifact in artifacts:
                service.delete_artifact(artifact)
                gone.append({"artifact_id": artifact, "deleted": True})
        finally:
            out.say("{artifact_id} is deleted", gone, output)


def _size(service: ServiceClient, artifact: str) -> int | None:
    """How many bytes will come, but for the manifest; unknown of an artifact that is older than a thousand others."""
    sizes = {one.artifact_id: one.size_bytes for one in service.list_artifacts(limit=_LISTED)}
    return sizes.get(artifact)


def _row(artifact: ArtifactInfo) -> dict[str, Any]:
    extra = {"size": _megabytes(artifact.size_bytes), "created": out.when(artifact.created_at)}
    return {**artifact.to_dict(), **extra}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
