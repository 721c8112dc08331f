"""``tg-tinker demo``: the whole product in a few minutes, through the public SDK and nothing else.

A base model is asked about a product it cannot know, taught, asked again in other words, saved, and restored elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import attrs
import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tg_tinker import home
from tg_tinker.cli import lesson
from tg_tinker.cli import output as out
from tg_tinker.cli.training_display import TrainingDisplay

if TYPE_CHECKING:
    from tg_tinker import Sample, ServiceClient, TrainingClient, TrainingConfig

__all__ = ["command"]

SMOLLM2: Final = "tg-tinker/smollm2-135m"
TINY: Final = "tg-tinker/tiny"
ROWS: Final = 8  # per batch
NEW_TOKENS: Final = 20
EXAMPLES: Final = 4  # answers shown from before the training, those with something in them first
PASS_MARK: Final = 0.8  # of the held-back questions
LAYERS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@attrs.frozen
class Outcome:
    """What the training came to."""

    first_loss: float
    last_loss: float
    tokens: int
    seconds: float


@click.command("demo")
@click.option(
    "--model", default=SMOLLM2, show_default=True, help="What to teach: a built-in name, a hub id or a folder."
)
@click.option(
    "--epochs", default=8, show_default=True, type=click.IntRange(1, 100), help="How often to go over the lessons."
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Order of the lessons and start of the adapter.",
)
@out.advice_for_people
def command(model: str, epochs: int, seed: int) -> None:
    """Teach a small model something new on this machine.

    No account, no GPU: the model is fetched once, a server is started beside this program, and what it learns is saved
    as a sealed checkpoint under TG_TINKER_HOME.
    """
    console = out.human()
    started = time.monotonic()
    passed = _Demo(console, model, epochs, seed).run()
    console.print(f"\n[dim]{time.monotonic() - started:.0f} s in all[/dim]")
    sys.exit(0 if passed else 1)


class _Demo:
    """The five acts, in order; each prints what it does."""

    def __init__(self, console: Console, model: str, epochs: int, seed: int) -> None:
        self.console = console
        self.model = model
        self.epochs = epochs
        self.seed = seed
        self.status = console.status("Starting a server on this machine and loading the model ...")
        self.questions = lesson.held_back()
        self.prompts = [lesson.prompt(question.question) for question in self.questions]

    def run(self) -> bool:
        """Play all acts; True when the model has learnt and the checkpoint gave it back exactly."""
        from tg_tinker import ServiceClient

        if self.model == SMOLLM2:
            self._fetch()
        with ServiceClient(progress=self._stage) as service:
            client = self._open(service)
            self._show_before(self._ask(client, "Asking about a product that the model cannot know ..."))
            outcome = self._teach(client)
            after = self._ask(client, "Asking again, in words that it was not trained on ...")
            self._show_after(after)
            learnt = self._judge(outcome, after)
            same = self._save_and_restore(service, client, after)
            self._farewell(client)
        return learnt and same

    def _fetch(self) -> None:
        from tg_tinker.cli.models import fetch_shown

        fetched = fetch_shown(SMOLLM2)
        self._say("Model", f"{self.model}{'' if fetched.fresh else ', fetched before'}: {fetched.folder}")

    def _open(self, service: ServiceClient) -> TrainingClient:
        start = time.monotonic()
        with self.status:
            client = service.create_training_client(self._config(self.seed))
        self._say("Server", f"started beside this program, model loaded: {time.monotonic() - start:.1f} s")
        return client

    def _stage(self, stage: str, text: str) -> None:
        """Show how far the server and the model are; called by the client."""
        self.status.update(f"{stage}: {text} ...")

    def _config(self, seed: int) -> TrainingConfig:
        from tg_tinker import LoRAConfig, OptimizerConfig, TrainingConfig

        return TrainingConfig(
            model_ref=self.model,
            lora_config=LoRAConfig(rank=16, alpha=32.0, dropout=0.0, target_modules=LAYERS),
            optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.0, warmup_steps=6, lr_scheduler="linear"),
            max_steps=self._steps(),
            seed=seed,
            metadata={"made_by": "tg-tinker demo"},
        )

    def _steps(self) -> int:
        return self.epochs * -(-len(lesson.lessons()) // ROWS)

    def _ask(self, client: TrainingClient, doing: str) -> Sequence[Sample]:
        with self.console.status(doing):
            result = client.sample(self.prompts, max_tokens=NEW_TOKENS, temperature=0.0)
        return result.samples

    def _teach(self, client: TrainingClient) -> Outcome:
        tokenizer = client.get_tokenizer()
        rows = [lesson.encode(tokenizer, one) for one in lesson.lessons()]
        losses: list[float] = []
        with TrainingDisplay(self.console, self._steps()) as display:
            for batch in lesson.batches(rows, size=ROWS, epochs=self.epochs, seed=self.seed):
                # Both are submitted before either is waited for: the server is never idle between them.
                gradients, step = client.forward_backward(batch), client.optim_step()
                losses.append(gradients.result().loss)
                step.result()
                display.advance(losses[-1], sum(map(sum, batch["attention_mask"])))
        outcome = Outcome(losses[0], losses[-1], display.tokens, display.seconds)
        speed = outcome.tokens / outcome.seconds
        self._say(
            "Training",
            f"{len(losses)} steps, {outcome.tokens} tokens, {speed:.0f} tokens/s; "
            f"loss {outcome.first_loss:.2f} -> {outcome.last_loss:.4f}",
        )
        return outcome

    def _show_before(self, before: Sequence[Sample]) -> None:
        self._say("Before", f"{self._right(before)} of {len(self.questions)} right; for instance")
        pairs = sorted(
            zip(self.questions, before, strict=True), key=lambda pair: not lesson.first_line(pair[1].completion)
        )
        for question, sample in pairs[:EXAMPLES]:
            answer = Text.assemble(f"           {question.question} ", (_short(sample.completion), "dim"))
            self.console.print(answer, soft_wrap=True)

    def _show_after(self, after: Sequence[Sample]) -> None:
        table = Table("", "Asked in words that were not trained on", "Answered", box=None, padding=(0, 1, 0, 0))
        for question, sample in zip(self.questions, after, strict=True):
            right = question.is_answered_by(sample.completion)
            mark = Text("right", "green") if right else Text("wrong", "bold red")
            table.add_row(mark, question.question, _short(sample.completion))
        self.console.print(table)
        self._say("After", f"{self._right(after)} of {len(self.questions)} right")

    def _right(self, samples: Sequence[Sample]) -> int:
        pairs = zip(self.questions, samples, strict=True)
        return sum(question.is_answered_by(sample.completion) for question, sample in pairs)

    def _judge(self, outcome: Outcome, after: Sequence[Sample]) -> bool:
        if self.model == TINY:
            fell = outcome.last_loss < 0.8 * outcome.first_loss
            self._say("Note", f"{TINY} has random weights: it cannot learn to answer, only its loss can fall")
            return fell or self._fail("the loss did not fall")
        enough = self._right(after) >= PASS_MARK * len(self.questions)
        return enough or self._fail(f"fewer than {PASS_MARK:.0%} of the held-back questions were answered right")

    def _save_and_restore(self, service: ServiceClient, client: TrainingClient, after: Sequence[Sample]) -> bool:
        saved = client.save_state(metadata={"made_by": "tg-tinker demo"})
        sealed = f"{saved.encryption.algorithm}, key {saved.encryption.key_id}"
        self._say("Saved", f"{saved.artifact_id}, step {saved.step}, {saved.size_bytes / 1e6:.1f} MB, sealed: {sealed}")
        fresh = service.create_training_client(self._config(self.seed + 1))
        blank = self._ask(fresh, "Asking a fresh run, before it is restored ...")
        fresh.load_state(saved.artifact_id)
        restored = self._ask(fresh, "Asking the restored run ...")
        same = [one.token_ids for one in restored] == [one.token_ids for one in after]
        self._say(
            "Restored",
            f"into the fresh run {fresh.id}: {self._right(blank)} right before, {self._right(restored)} after; "
            f"every token {'the same' if same else 'should be the same, but is not'}",
        )
        return same or self._fail("the restored run answers differently")

    def _farewell(self, client: TrainingClient) -> None:
        self._say("Everything", f"run {client.id} and its checkpoint lie in {home.folder()}")
        self._say("Next", "put your own questions into examples/sft_blocking.py; `tg-tinker doctor` knows this machine")

    def _say(self, what: str, text: str) -> None:
        self.console.print(Text.assemble((f"{what:<11}", "bold cyan"), text), soft_wrap=True)

    def _fail(self, why: str) -> bool:
        self.console.print(Text.assemble(("Failed     ", "bold red"), why))
        return False


def _short(text: str, limit: int = 60) -> str:
    said = lesson.first_line(text)
    line = "".join(letter if letter.isprintable() else "?" for letter in said) or "(nothing)"
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
