"""The two readers of poll answers, as pure functions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tg_tinker import errors
from tg_tinker.core.reply import Reply
from tg_tinker.core.retrieval import Done, Failed, LoopsRetrieval, Pending, Retrieval, TGRetrieval


def reply(body: Any, status: int = 200) -> Reply:
    """An answer with a JSON body."""
    return Reply(status, {}, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("retrieval", "answer", "said"),
    [
        (TGRetrieval(), reply({"status": "completed", "result": None}), Done(None)),
        (TGRetrieval(), reply({"status": "running", "result": None}), Pending("running")),
        (TGRetrieval(), reply({"status": "queued"}), Pending("pending")),
        (TGRetrieval(), reply({"message": "not yet"}, 202), Pending("pending")),
        (TGRetrieval(), reply("", 408), Pending("pending")),
        (LoopsRetrieval(), reply({"status": "done", "result": [1]}), Done([1])),
        (LoopsRetrieval(), reply({"status": "running"}), Pending("running")),
        (LoopsRetrieval(), reply({"status": "strange"}), Pending("pending")),
        (LoopsRetrieval(), reply("", 408), Pending("pending")),
    ],
)
def test_answers_that_are_no_failure(retrieval: Retrieval, answer: Reply, said: Pending | Done) -> None:
    """Done with its result, or pending with what is known."""
    assert retrieval.read(answer) == said


@pytest.mark.parametrize(
    ("retrieval", "body", "kind", "message"),
    [
        (TGRetrieval(), {"status": "failed", "error": "text"}, errors.OperationFailedError, "text"),
        (TGRetrieval(), {"status": "failed", "error": None}, errors.OperationFailedError, "the operation failed"),
        (
            TGRetrieval(),
            {"status": "failed", "error": {"code": "INTERNAL_ERROR", "message": "bug"}},
            errors.ServerError,
            "bug",
        ),
        (TGRetrieval(), {"status": "cancelled", "error": None}, errors.FutureCancelledError, "the operation failed"),
        (LoopsRetrieval(), {"status": "error", "error": "boom"}, errors.OperationFailedError, "boom"),
        (LoopsRetrieval(), {"status": "error", "error_class": "ValueError"}, errors.OperationFailedError, "ValueError"),
        (
            LoopsRetrieval(),
            {"status": "error", "error": "bad", "code": "VALIDATION_ERROR", "details": {"field": "data"}},
            errors.InvalidRequestError,
            "bad",
        ),
    ],
)
def test_failures_are_typed(
    retrieval: Retrieval, body: dict[str, Any], kind: type[errors.TGTinkerError], message: str
) -> None:
    """A known code gives its class, anything else is an operation that failed."""
    said = retrieval.read(reply(body))
    assert isinstance(said, Failed)
    assert type(said.error) is kind
    assert said.error.message == message


@pytest.mark.parametrize("retrieval", [TGRetrieval(), LoopsRetrieval()])
def test_an_answer_that_is_no_object_is_a_typed_error(retrieval: Retrieval) -> None:
    """A list where an object belongs is the server's fault."""
    with pytest.raises(errors.ServerError, match=r"not an object: \[1\]"):
        retrieval.read(reply([1]))
    with pytest.raises(errors.ServerError, match="without a"):
        retrieval.ticket([1])


def test_cancellations_are_read() -> None:
    """Only a clear yes is a yes."""
    assert TGRetrieval().cancelled(reply({"success": True}))
    assert not TGRetrieval().cancelled(reply({"success": False}))
    assert not TGRetrieval().cancelled(reply({}, 409))
    assert LoopsRetrieval().cancelled(reply({}))
    assert not LoopsRetrieval().cancelled(reply({}, 409))


def test_paths_quote_their_parts() -> None:
    """A ticket cannot reach another route."""
    assert TGRetrieval().poll_path("a/../b", 1.5) == "/v1/futures/a%2F..%2Fb/result?wait=1.500"
    assert TGRetrieval().cancel_path("a b") == "/v1/futures/a%20b/cancel"
    assert LoopsRetrieval("/t").poll_path("x", 0) == "/t/operations/x?wait=0.000"
    assert LoopsRetrieval("/t").cancel_path("x y") == "/t/operations/x%20y/cancel"
