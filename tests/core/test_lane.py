"""The order in which a run's submits reach the server."""

from __future__ import annotations

import asyncio

import pytest

from tg_tinker.core.lane import Lane, Place


async def visit(place: Place, log: list[int], *, fails: bool = False) -> None:
    """Stand in line, note the turn, and leave."""
    async with place:
        log.append(place.number)
        await asyncio.sleep(0)
        if fails:
            raise ValueError


async def test_turns_come_in_the_order_in_which_places_were_taken() -> None:
    """Places taken first go first, whenever their tasks get to run."""
    lane, log = Lane(), list[int]()
    places = [lane.take() for _ in range(5)]
    await asyncio.gather(*(visit(place, log) for place in reversed(places)))
    assert log == [1, 2, 3, 4, 5]
    assert repr(lane) == "<Lane 5 taken>"


async def test_a_place_that_fails_lets_the_next_one_go() -> None:
    """An error inside a turn gives the place up."""
    lane, log = Lane(), list[int]()
    first, second = lane.take(), lane.take()
    with pytest.raises(ValueError):
        await visit(first, log, fails=True)
    await visit(second, log)
    assert log == [1, 2]


async def test_a_cancelled_wait_leaves_no_hole_and_lets_nobody_overtake() -> None:
    """Who stands behind a cancelled place waits for those ahead of it, and for nobody else."""
    lane, log = Lane(), list[int]()
    first, second, third = lane.take(), lane.take(), lane.take()
    waiting = asyncio.create_task(visit(second, log))
    last = asyncio.create_task(visit(third, log))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0.01)
    assert log == [], "the third must not go before the first"
    assert repr(lane) == "<Lane 3 taken, busy>"
    await visit(first, log)
    await last
    assert log == [1, 3]


async def test_leaving_twice_counts_once() -> None:
    """A place given up early and again at the end does not let anybody overtake."""
    lane, log = Lane(), list[int]()
    first, second, third = lane.take(), lane.take(), lane.take()
    second.leave()
    second.leave()
    last = asyncio.create_task(visit(third, log))
    await asyncio.sleep(0.01)
    assert log == []
    await visit(first, log)
    await last


async def test_a_refused_gradient_spoils_the_places_taken_before_it_was_known() -> None:
    """Only those who could not know of the refusal are spoilt."""
    lane = Lane()
    first, second = lane.take(), lane.take()
    first.refuse("forward_backward #1")
    assert second.spoiler == "forward_backward #1"
    assert lane.take().spoiler is None


async def test_a_gradient_spoils_nobody_ahead_of_it() -> None:
    """What was cancelled in the middle of the line concerns those behind it alone, and is forgotten with the line."""
    lane = Lane()
    ahead, cancelled, behind = lane.take(), lane.take(), lane.take()
    cancelled.refuse("forward_backward #2")
    assert ahead.spoiler is None
    assert behind.spoiler == "forward_backward #2"
    for place in (ahead, cancelled, behind):
        place.leave()
    assert lane.take().spoiler is None
    assert lane.missing == []
