"""The passes behind a run's next step: which of them came to nothing, and whether the step's client knew that.

A pass comes to nothing by failing, by being stopped, or by being cancelled while it still waited for its turn.
"""

from __future__ import annotations

from queue import SimpleQueue

from tg_tinker.server.records.tickets import Ticket

WITHDRAWN = "it was cancelled before it ran"


class Passes:
    """Hears of every pass with gradients. ``accepted`` is called on the event loop, the rest on the device thread."""

    def __init__(self) -> None:
        self._news: SimpleQueue[Ticket] = SimpleQueue()
        self._waiting: list[Ticket] = []  # accepted, and not begun
        self._failed: list[tuple[Ticket, str]] = []  # since the last step, and why

    def accepted(self, ticket: Ticket) -> None:
        """A pass has its place in the run's order; to be said before whatever comes behind it is accepted."""
        self._news.put(ticket)

    def begun(self, ticket: Ticket) -> None:
        """Its turn has come."""
        ticket.begun = True
        self._take_news()

    def failed(self, ticket: Ticket, error: BaseException) -> None:
        """It added nothing. Its error itself would keep the frames of the pass alive, and with them its batch."""
        self._failed.append((ticket, str(getattr(error, "message", error)) or "it was cancelled"))

    def forget(self) -> None:
        """What failed so far no longer matters: the weights were replaced, and the gradients with them."""
        self._take_news()
        self._failed.clear()
        self._waiting = [ticket for ticket in self._waiting if ticket.job is not None and ticket.job.state == "queued"]

    def spoiler(self, step: Ticket) -> str | None:
        """Name a pass that this step counts on in vain: the client of the step could not know when it was accepted."""
        self._take_news()
        # The order is kept: a pass before this step that has not begun by now was taken out of the queue.
        withdrawn = [(ticket, WITHDRAWN) for ticket in self._waiting if ticket.accepted <= step.accepted]
        self._waiting = [ticket for ticket in self._waiting if ticket.accepted > step.accepted]
        failed, self._failed = self._failed, []
        for culprit, cause in (*failed, *withdrawn):
            if culprit.failure_told is None or culprit.failure_told > step.accepted:
                return f"{culprit.operation} {culprit.id} before it failed: {cause}"
        return None

    def _take_news(self) -> None:
        while not self._news.empty():
            self._waiting.append(self._news.get())
        self._waiting = [ticket for ticket in self._waiting if not ticket.begun]
