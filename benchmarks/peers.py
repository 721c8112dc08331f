"""What people write by hand, in a process of its own: a PEFT training loop and Hugging Face ``generate``.

``python -m benchmarks.peers FOLDER THREADS`` reads commands such as ``train 8 256`` and answers each with one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.measure import Cost, cost, environment
from benchmarks.models import RANK

_PEFT_SEED = 0


class TorchPeer:
    """The two loops on one model; each call does one piece of work and tells its cost."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.manual_seed(_PEFT_SEED)
        load = AutoModelForCausalLM.from_pretrained
        self.plain = load(folder, dtype=torch.float32).eval()
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(load(folder, dtype=torch.float32), config).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.vocabulary = int(self.plain.config.vocab_size)

    def train(self, rows: int, length: int) -> Cost:
        """Forward and backward over ``rows`` sequences of ``length`` tokens, every one of them a label."""
        import torch

        tokens = torch.randint(self.vocabulary, (rows, length))

        def work() -> None:
            self.model(input_ids=tokens, labels=tokens).loss.backward()

        return cost(work)

    def optim(self) -> Cost:
        """One step of AdamW, and the gradients gone."""

        def work() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()

        return cost(work)

    def generate(self, streams: int, prompt: int, new: int) -> Cost:
        """Sample ``new`` tokens for each of ``streams`` prompts in one batch, from the model without an adapter."""
        import torch

        tokens = torch.randint(300, self.vocabulary, (streams, prompt))
        settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "min_new_tokens": new, "max_new_tokens": new}

        def work() -> None:
            mask = torch.ones_like(tokens)
            with torch.inference_mode():
                self.plain.generate(input_ids=tokens, attention_mask=mask, pad_token_id=0, **settings)

        return cost(work)


class PeerProcess:
    """A ``TorchPeer`` elsewhere, asked line by line, so that its memory and threads are not ours."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads),
        )
        self._answer()

    def __enter__(self) -> Self:
        """It is loaded and waits."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def __call__(self, *command: object) -> Cost:
        """Have one piece of work done."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, command)) + "\n")
        self._process.stdin.flush()
        wall, cpu = self._answer()
        return Cost(wall, cpu)

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with exit code {self._process.wait()}")
        answer: list[float] = json.loads(line)
        return answer


def main() -> None:
    """Serve commands until standard input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print too
    peer = TorchPeer(Path(sys.argv[1]), int(sys.argv[2]))
    print("[]", file=answers, flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        done: Cost = getattr(peer, name)(*map(int, numbers))
        print(json.dumps([done.wall, done.cpu]), file=answers, flush=True)


if __name__ == "__main__":
    main()
