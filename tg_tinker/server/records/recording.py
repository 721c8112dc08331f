"""What is written of an operation before it is told: joins the trail, the journal of futures and the audit log.

``docs/audit.md`` says what follows for a server that is killed.
"""

from __future__ import annotations

import asyncio

from tg_tinker.errors import ServerError
from tg_tinker.server.records.auditing import Auditing
from tg_tinker.server.records.journal import Journal
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.server.records.trail import Trail


class Recording:
    """Hears of every ticket that is accepted or ends."""

    def __init__(self, trail: Trail, journal: Journal, auditing: Auditing) -> None:
        self._trail = trail
        self._journal = journal
        self._auditing = auditing
        self._turning: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin writing."""
        self._journal.start()
        self._auditing.start()

    async def aclose(self) -> None:
        """Write what is left; what cannot be written stays in the trail."""
        written = [await self._journal.aclose(), await self._auditing.aclose()]
        if self._turning is not None:
            await self._turning
        self._trail.close(keep=not all(written))

    def accepted(self, ticket: Ticket) -> None:
        """Write that it was accepted."""
        self._trail.add(self._auditing.accepted(ticket), ticket.key)
        self._journal.note(ticket)

    def ended(self, ticket: Ticket) -> None:
        """Write how it ended."""
        self._trail.add(self._auditing.ended(ticket))
        self._journal.note(ticket)
        if self._trail.long and (self._turning is None or self._turning.done()):
            self._turning = asyncio.create_task(self._turn(), name="turn the trail")

    async def before_telling(self, ticket: Ticket) -> None:
        """Wait for the entry of what spent privacy, or made or read an artifact: that must outlive the machine, too.

        Raises ``ServerError`` where the audit log cannot be written in time.
        """
        if ticket.produced or ticket.consumed or ticket.dp_metrics:
            await self._auditing.flush()

    async def _turn(self) -> None:
        """Begin a new file of the trail, and delete the one before when the database has it all."""
        number = self._trail.turn()
        try:
            await self._journal.flush()
            await self._auditing.flush()
        except ServerError:
            return  # it stays, until a later turn or the end
        self._trail.forget_before(number)
