"""Trainers of another server: waited for while they are set up, and kept from being shut down as idle.

A trainer of ours answers as soon as it is made, and lives as long as its server; nothing here concerns it. All
coroutines run at home.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from weakref import ReferenceType, finalize, ref

from tg_tinker.bridge import Home, Job
from tg_tinker.core.call import Call, call
from tg_tinker.core.run import RunCore
from tg_tinker.errors import (
    ClientClosedError,
    ResourceNotFoundError,
    ServerError,
    ServerUnreachableError,
    TGTinkerError,
)
from tg_tinker.wire import loops

__all__ = ["keep_awake", "wait_until_healthy"]

_logger = logging.getLogger("tg_tinker.loops")

_HEALTH_PAUSE = 2.0  # seconds between questions to a trainer that is being set up
_HEARTBEAT = 60.0  # seconds; a published trainer that hears nothing for 900 is shut down
_WORTH_A_WARNING = 5  # heartbeats in a row without an answer
_HOPELESS = frozenset({"FAILED", "STOPPED", "PREEMPTED"})  # deployments that will never answer


async def wait_until_healthy(core: RunCore, run: loops.Run, timeout: float) -> None:
    """Wait until a trainer that was just provisioned answers.

    Raises its last error after ``timeout`` seconds, and ``ServerError`` as soon as its deployment has failed.
    """
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        try:
            await core.perform(_health(run))
        except (ResourceNotFoundError, ServerError, ServerUnreachableError):
            await _check_deployment(core, run)
            if asyncio.get_running_loop().time() + _HEALTH_PAUSE > deadline:
                raise
            await asyncio.sleep(_HEALTH_PAUSE)
        else:
            return


def keep_awake(core: RunCore, run: loops.Run) -> None:
    """Ask after the trainer's health from now on, until its client is closed or dropped."""
    job = core.home.spawn(_beat(ref(core), run), name=f"heartbeat of {run.id}", group=core.tasks)
    finalize(core, _stop, core.home, job).atexit = False  # at exit the bridge ends what is under way


def _stop(home: Home, job: Job[None]) -> None:
    """Nobody has the client any more; this may be any thread."""
    with suppress(ClientClosedError):
        home.call_soon(job.stop)


async def _beat(held: ReferenceType[RunCore], run: loops.Run) -> None:
    missed = 0
    while True:
        await asyncio.sleep(_HEARTBEAT)
        core = held()  # let go of at the end of each beat, or a client that nobody has any more would live on here
        if core is None:
            return
        try:
            await core.perform(_health(run))
            missed = 0
        except TGTinkerError as error:
            missed += 1
            if missed == _WORTH_A_WARNING:
                _logger.warning("%r has not answered %d heartbeats in a row: %s", core, missed, error)
        del core


async def _check_deployment(core: RunCore, run: loops.Run) -> None:
    """Raise ``ServerError`` where the trainer will never answer; whoever does not know its deployment says nothing."""
    if run.deployment_id is None:
        return
    try:
        envelope = await core.perform(call(loops.DEPLOYMENT, parts={"id": run.deployment_id}))
    except TGTinkerError:
        return
    status = envelope.deployment.status.name
    if status in _HOPELESS:
        message = f"the trainer {run.id} will not come up: its deployment {run.deployment_id} is {status}"
        details = {"deployment_id": run.deployment_id, "status": status}
        raise ServerError(message, code="DEPLOYMENT_FAILED", details=details)


def _health(run: loops.Run) -> Call[bool]:
    return call(loops.HEALTH, base=run.base_url, query={"base_model": run.base_model}, decode=bool, whole_reply=True)
