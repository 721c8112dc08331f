"""The Hugging Face hub: whether it can be asked at all, and what was fetched from it before.

Fetching is transformers' work. Asked while there is no network, that tries again for most of a minute, file by file;
one short question beforehand spares the wait.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download

__all__ = ["fetched", "reachable"]

_PATIENCE = 5.0  # seconds


def reachable() -> bool:
    """Whether the hub answers, whatever it says; proxies and ``HF_ENDPOINT`` count, ``HF_HUB_OFFLINE`` says no."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    # Name resolution, proxies, certificates and the HTTP library itself raise classes of their own.
    except Exception:  # noqa: BLE001 - see above: there was no answer, for whatever reason
        return False
    return True


def fetched(ref: str) -> Path:
    """The folder of a model that was fetched before; raises what the hub's library raises where there is none."""
    return Path(snapshot_download(ref, local_files_only=True))
