"""What both type checkers must refuse: each marked line names the codes of mypy and of pyright. Never executed."""

from __future__ import annotations

from api import Loss, Trainer

import tg_tinker
from tg_tinker import LoadStateResult, OperationFuture, ServiceClient, loops
from tg_tinker.core.call import Call
from tg_tinker.faces import operation, twin


async def wrong_arguments(trainer: Trainer) -> None:
    trainer.step(["a"])  # expect: list-item reportArgumentType
    trainer.step([1], "2")  # expect: arg-type reportArgumentType
    trainer.step([1], nte="x")  # expect: call-arg reportCallIssue
    trainer.step()  # expect: call-arg reportCallIssue
    trainer.step([1], 1.0, "x")  # expect: call-arg reportCallIssue
    await trainer.step_async(["a"])  # expect: list-item reportArgumentType
    await trainer.step_async([1], nte="x")  # expect: call-arg reportCallIssue
    trainer.evaluate("x")  # expect: arg-type reportArgumentType
    await trainer.evaluate_async(1)  # expect: arg-type reportArgumentType
    trainer.tokens(1)  # expect: arg-type reportArgumentType
    trainer.tokens_async(1)  # expect: arg-type reportArgumentType
    trainer.publish(1)  # expect: arg-type reportArgumentType
    trainer.publish([1]).result(timeout="5")  # expect: arg-type,arg-type reportArgumentType,reportArgumentType


async def wrong_results(trainer: Trainer) -> None:
    loss: int = trainer.step([1]).result()  # expect: assignment reportAssignmentType
    other: int = await trainer.step([1])  # expect: assignment reportAssignmentType
    value: str = trainer.evaluate([1])  # expect: assignment reportAssignmentType
    early: Loss = trainer.step([1])  # expect: assignment reportAssignmentType
    once: Loss = await trainer.step_async([1])  # expect: assignment reportAssignmentType
    print(loss, other, value, early, once)


class NoCore:
    """A class without what faces need."""

    @operation  # expect: type-var reportArgumentType
    def step(self) -> Call[int]:
        """Have nowhere to go."""
        raise NotImplementedError


def not_a_face(number: int) -> int:
    """Be no face at all."""
    return number


wrong = twin(not_a_face)  # expect: type-var reportArgumentType


async def wrong_use_of_the_surfaces(
    tc: tg_tinker.TrainingClient, run: loops.TrainingClient, sampler: loops.SamplingClient, client: ServiceClient
) -> None:
    tg_tinker.LoRAConfig(r=3)  # expect: call-arg reportCallIssue
    tg_tinker.TrainingConfig()  # expect: call-arg reportCallIssue
    loops.AdamParams(lr=1e-3)  # expect: call-arg reportCallIssue
    tg_tinker.BatchData([[1]], label=[[1]])  # expect: call-arg reportCallIssue
    tc.forward_backward([1])  # expect: arg-type reportArgumentType
    tc.optim_step(apply_noise=True)  # expect: call-arg reportCallIssue
    tc.sample("a", seed="1")  # expect: arg-type reportArgumentType
    tc.sample("a", 1, 1.0, 1.0, None, None, 1, 1.0, 0.0, 0.0, 5)  # expect: call-arg reportCallIssue
    tc.sample_stream("a", top_pp=1.0)  # expect: call-arg reportCallIssue
    tc.sample_stream(["a"])  # expect: arg-type reportArgumentType
    saved: str = tc.save_state()  # expect: assignment reportAssignmentType
    loaded: OperationFuture[LoadStateResult] = tc.load_state("a")  # expect: assignment reportAssignmentType
    tc.step = 5  # expect: misc reportAttributeAccessIssue
    run.forward_backward(["a"])  # expect: list-item reportArgumentType
    run.forward_backward([], "crossentropy")  # expect: arg-type reportArgumentType
    run.optim_step(1e-4)  # expect: arg-type reportArgumentType
    await run.save_state_async(5)  # expect: arg-type reportArgumentType
    path: str = run.load_state("p")  # expect: assignment reportAssignmentType
    sampler.sample("text", 1.5)  # expect: arg-type,arg-type reportArgumentType,reportArgumentType
    client.create_training_client(config=5)  # expect: arg-type reportArgumentType
    client.create_lora_training_client("m", lora_rank=8)  # expect: call-arg reportCallIssue
    print(saved, loaded, path)
