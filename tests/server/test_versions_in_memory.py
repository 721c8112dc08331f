from __future__ import annotations

import asyncio

from tg_tinker.server.weights.versions import LEASES, Version, Versions


def version(number: int) -> Version:
    """A published version without weights."""
    return Version(number, f"v{number}", None)


async def test_versions_in_use_outlive_newer_ones():
    """The newest few stay, and of the others those that were used lately; the count is bounded whatever is used."""
    versions = Versions(kept=3, most_aside=0)
    for number in range(1, 11):
        versions.add(version(number))
        versions.get(1)
    assert versions.newest == 10
    assert [number for number in range(11) if versions.get(number) is not None] == [1, 8, 9, 10]
    for number in range(11, 500):
        versions.add(version(number))
        versions.get(number)
    assert len(versions) <= 3 + LEASES


async def test_waiting_for_a_version_is_an_event():
    """Whoever waits is woken by the publish that is enough, not by one before it, and by the end of the server."""
    versions = Versions(kept=2, most_aside=0)
    waiting = asyncio.create_task(versions.reached(2, 20))
    versions.add(version(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    versions.add(version(2))
    assert await waiting
    assert not await versions.reached(3, 0.01)
    endless = asyncio.create_task(versions.reached(3, 20))
    await asyncio.sleep(0)
    versions.close()
    assert not await endless
