"""What a piece of work costs client and server together: the embedded server is a child of this process."""

from __future__ import annotations

from collections.abc import Awaitable
from time import perf_counter, process_time
from typing import Any

from benchmarks.measure import Cost


class ServerCost:
    """The server that was started last; ``of`` measures a piece of work that involves it."""

    def __init__(self) -> None:
        import psutil  # type: ignore[import-untyped]

        servers = [one for one in psutil.Process().children() if "tg_tinker.server" in one.cmdline()]
        self._server: Any = max(servers, key=lambda one: one.create_time())

    async def of(self, work: Awaitable[object]) -> Cost:
        """Await the work; CPU seconds are those of both processes."""
        wall, cpu = perf_counter(), self._cpu()
        await work
        return Cost(perf_counter() - wall, self._cpu() - cpu)

    def server_cpu(self) -> float:
        """CPU seconds of the server since it was started."""
        times = self._server.cpu_times()
        return float(times.user + times.system)

    def memory_mb(self) -> float:
        """Resident memory of the server."""
        return float(self._server.memory_info().rss) / (1 << 20)

    def _cpu(self) -> float:
        return process_time() + self.server_cpu()
