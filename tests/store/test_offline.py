from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tg_tinker.store.offline import open_artifact

OPEN_WITHOUT_TORCH = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from tg_tinker.store.offline import open_artifact
opened = open_artifact(Path(sys.argv[1]), Path(sys.argv[2]))
print(opened.tensors["a"].tolist(), opened.counters, opened.manifest["header"]["metadata"])
unwanted = {"sqlalchemy", "aiohttp", "transformers", "fcntl"} & set(sys.modules)
print(sorted(unwanted))
"""


def test_a_pulled_artifact_opens_without_server_or_torch(vault, tmp_path: Path) -> None:
    """The owner opens pulled bytes with the exported key in a program that has no torch at all."""
    data, key = tmp_path / "pulled.tgart", tmp_path / "key.json"
    data.write_bytes(vault.store.pull("acme", vault.save().artifact_id))
    key.write_bytes(vault.keys.export("acme"))
    command = [sys.executable, "-c", OPEN_WITHOUT_TORCH, str(data), str(key)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] {'nested': {'seed': 7}, 'step': 3} {'epoch': 5}",
        "[]",
    ]


def test_a_key_exported_after_rotation_opens_older_artifacts(vault) -> None:
    """Artifacts pulled before a rotation open with the key file exported after it."""
    data = vault.store.pull("acme", vault.save().artifact_id)
    vault.keys.rotate("acme")
    assert open_artifact(data, vault.keys.export("acme")).counters["step"] == 3


def test_every_dtype_comes_out_as_numpy(vault) -> None:
    """Each dtype is read exactly; bfloat16, which numpy lacks, as the equal float32."""
    tensors = {
        str(dtype): torch.tensor([[0, 1], [1, 0]]).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    }
    tensors["bf16"] = torch.tensor([1.5, -2.75, 3e38, -0.0]).bfloat16()
    tensors["scalar"] = torch.tensor(3.25)
    data = vault.store.pull("acme", vault.save(tensors=tensors).artifact_id)
    arrays = open_artifact(data, vault.keys.export("acme")).tensors
    assert arrays["bf16"].dtype == np.float32
    for name, tensor in tensors.items():
        expected = tensor.float().numpy() if name == "bf16" else tensor.numpy()
        assert arrays[name].shape == expected.shape
        assert arrays[name].tobytes() == expected.tobytes()
