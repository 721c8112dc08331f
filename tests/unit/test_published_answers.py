"""What published servers answered, as recorded, read by the client's own tables: it works against a real trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tg_tinker.core.reply import Reply
from tg_tinker.core.retrieval import Done, LoopsRetrieval
from tg_tinker.types.loops_results import LoraAdapterConfig
from tg_tinker.wire import codec, completions, loops
from tg_tinker.wire.route import Route

TRANSCRIPTS = sorted((Path(__file__).parents[1] / "fixtures" / "transcripts").glob("*.json"))
ROUTES = [route for route in vars(loops).values() if isinstance(route, Route)]
RETRIEVAL = LoopsRetrieval()


def answers(transcript: Path) -> Iterator[tuple[Route[Any], dict[str, Any]]]:
    """The exchanges that went well, of the routes that this client has."""
    for exchange in json.loads(transcript.read_text(encoding="utf-8")):
        path = exchange["path"].partition("?")[0]
        fitting = (
            route
            for route in ROUTES
            if route.method == exchange["method"] and re.fullmatch(re.sub(r"{\w+}", "[^/]+", route.path), path)
        )
        route = next(fitting, None)
        if route is not None and exchange["status"] < 300:
            yield route, exchange


def read(route: Route[Any], exchange: dict[str, Any], submitted: dict[str, Route[Any]]) -> object:
    """The value that the client makes of an answer."""
    answer = exchange["response"]
    if route.kind == "submit":
        submitted[RETRIEVAL.ticket(answer)] = route
        return answer
    if route is loops.OPERATION:
        said = RETRIEVAL.read(Reply(exchange["status"], {}, codec.dumps(answer)))
        assert isinstance(said, Done)
        return codec.decode(submitted[answer["operation_id"]].returns, said.result)
    if route is loops.SAMPLE:
        return completions.read_response(answer, exchange.get("response_headers", {}), exchange["body"]["prompt"])
    return codec.decode(route.returns, answer)


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda path: path.stem)
def test_every_recorded_answer_is_understood(transcript: Path) -> None:
    """Acceptances, outcomes, samples, runs, samplers and checkpoints of both generations become the client's values."""
    submitted: dict[str, Route[Any]] = {}
    for route, exchange in answers(transcript):
        if "prompt_logprobs" in exchange.get("body", {}):
            continue  # the recording has left the tables empty
        assert read(route, exchange, submitted) is not None
    assert submitted


@pytest.mark.parametrize("said", [{"r": 16}, {"rank": 16}, {"rank": 16, "r": 16}])
def test_a_rank_has_two_names(said: dict[str, int]) -> None:
    """Published control planes call the rank of a checkpoint ``r``."""
    assert codec.decode(LoraAdapterConfig, said) == LoraAdapterConfig(rank=16)
