from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tg_tinker.engine.sampling import logits as logits_of
from tg_tinker.engine.sampling.generation import GenerationRequest
from tg_tinker.engine.sampling.logits import Penalties, Settings
from tg_tinker.engine.sampling.sampling_batch import SamplingBatch
from tg_tinker.engine.sampling.stream import Stream


def stream_of(request, tokens=()):
    """A stream that has said ``tokens``."""
    stream = Stream(1, request, None, limit=1000, eos=frozenset(), decode=lambda _ids: "")
    for token in tokens:
        stream.take(token, -1.0)
    return stream


def request_of(prompt=(1, 2, 3), **values):
    """A request with one prompt."""
    return GenerationRequest(prompt=prompt, **{"max_tokens": 10, "seed": 0, **values})


def processed(scores, request, tokens):
    """The oracle: transformers' own processors, with presence and frequency as the OpenAI API states them between."""
    ids = torch.tensor([[*request.prompt, *tokens]])
    scores = RepetitionPenaltyLogitsProcessor(float(request.repetition_penalty))(ids, scores.clone())
    for token in set(tokens):
        scores[0, token] -= tokens.count(token) * request.frequency_penalty + request.presence_penalty
    warpers = [TemperatureLogitsWarper(float(request.temperature))]
    if request.top_k:
        warpers.append(TopKLogitsWarper(request.top_k))
    if request.top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(request.top_p)))
    return LogitsProcessorList(warpers)(ids, scores)[0].double().softmax(-1)


def drawn(scores, request, tokens, count):
    """What ours draws at ``count`` evenly spaced uniform numbers."""
    streams = [stream_of(request, tokens) for _ in range(count)]
    batch = SamplingBatch(streams, scores.shape[1], torch.device("cpu"))
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return logits_of.sample(scores.expand(count, -1).clone(), batch._settings, uniform)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([17, 128, 700, 1300]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([None, 0, 1, 5, 600, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    repetition=st.sampled_from([1.0, 1.3, 0.8]),
    presence=st.sampled_from([0.0, 0.7, -0.5]),
    frequency=st.sampled_from([0.0, 0.4, -0.2]),
)
def test_draws_follow_the_distribution_of_transformers(
    seed, vocabulary, temperature, top_k, top_p, repetition, presence, frequency
):
    """Each uniform number picks the token where the cumulative distribution of transformers' processors passes it."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, vocabulary, generator=generator) * 2
    tokens = torch.randint(0, vocabulary, (6,), generator=generator).tolist()
    request = request_of(
        prompt=(0, 1, 5, 5), temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition,
        presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip
    share = processed(scores, request, tokens)
    count = 500
    chosen, logprobs = drawn(scores, request, tokens, count)
    edges = share.cumsum(-1)
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    expected = torch.searchsorted(edges, uniform, right=True).clamp(max=vocabulary - 1)
    distance = (edges[None] - uniform[:, None]).abs().amin(-1)
    clear = distance > 1e-5
    assert torch.equal(chosen[clear], expected[clear])
    plain = (scores[0].double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, plain[chosen], rtol=0, atol=1e-5)


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_penalties_are_their_formulas(seed):
    """Repetition divides or multiplies by sign, frequency subtracts per use, presence once."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 30, generator=generator)
    counts = torch.randint(0, 3, (1, 30), generator=generator).float()
    seen = (counts > 0) | (torch.rand(1, 30, generator=generator) < 0.3)
    column = [torch.tensor([[value]]) for value in (1.7, 0.3, 0.2)]
    own = logits_of.penalize(scores, Penalties(torch.tensor([0]), seen, counts, *column))
    for token in range(30):
        value = float(scores[0, token])
        if seen[0, token]:
            value = value / 1.7 if value > 0 else value * 1.7
        value -= float(counts[0, token]) * 0.2 + (0.3 if counts[0, token] > 0 else 0.0)
        assert float(own[0, token]) == pytest.approx(value, abs=1e-5)


def test_a_row_is_sampled_alike_whatever_its_neighbours_ask():
    """Greedy, plain, truncated and penalised rows in one batch give what each gives alone."""
    requests = [
        request_of(temperature=0.0),
        request_of(),
        request_of(temperature=0.3, top_k=3),
        request_of(top_p=0.6),
        request_of(repetition_penalty=1.5, temperature=2.0),
        request_of(temperature=0.0, presence_penalty=50.0),
        request_of(temperature=0.7, frequency_penalty=1.0, top_p=0.8, top_k=40),
    ]
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(len(requests), 900, generator=generator) * 3
    streams = [stream_of(request, tokens=(4, 4, 9)) for request in requests]
    tokens, logprobs = SamplingBatch(streams, 900, torch.device("cpu")).sample(scores)
    for row, stream in enumerate(streams):
        token, logprob = SamplingBatch([stream], 900, torch.device("cpu")).sample(scores[row : row + 1])
        assert (tokens[row], logprobs[row]) == (token[0], logprob[0])


def test_greedy_takes_the_largest_penalised_logit():
    """Temperature 0 is argmax after penalties, and its logprob is the untempered one of the plain logits."""
    scores = torch.tensor([[2.0, 1.9, -1.0, 0.5]])
    plain = scores.double().log_softmax(-1)[0]
    batch = SamplingBatch([stream_of(request_of(temperature=0.0))], 4, torch.device("cpu"))
    assert batch.sample(scores) == ([0], [pytest.approx(float(plain[0]), abs=1e-6)])
    punished = stream_of(request_of(prompt=(3,), temperature=0.0, presence_penalty=0.5), tokens=(0,))
    assert SamplingBatch([punished], 4, torch.device("cpu")).sample(scores)[0] == [1]


def test_penalties_see_each_new_token():
    """A batch that goes on counts what it draws itself."""
    request = request_of(prompt=(3,), temperature=0.0, frequency_penalty=1.0)
    batch = SamplingBatch([stream_of(request)], 4, torch.device("cpu"))
    scores = torch.tensor([[2.0, 1.5, 1.2, 0.0]])
    assert [batch.sample(scores)[0][0] for _ in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 1e5])
def test_extreme_temperatures_stay_finite(temperature):
    """No temperature overflows: a tiny one is greedy in effect, a huge one uniform."""
    scores = torch.tensor([[1000.0, -1000.0, 999.0]])
    tokens, logprobs = SamplingBatch([stream_of(request_of(temperature=temperature))], 3, torch.device("cpu")).sample(
        scores
    )
    assert math.isfinite(logprobs[0])
    assert tokens == [0] or temperature > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_nan(bad):
    """A row with NaN or infinity is marked by a NaN logprob; its neighbours are not touched."""
    scores = torch.randn(3, 300)
    scores[1, 7] = bad
    streams = [stream_of(request_of(top_p=0.9)), stream_of(request_of(top_k=4)), stream_of(request_of())]
    _, logprobs = SamplingBatch(streams, 300, torch.device("cpu")).sample(scores)
    assert [math.isnan(value) for value in logprobs] == [False, True, False]


def test_impossible_tokens_are_never_picked():
    """The ends of the interval, 0 and just below 1, fall on tokens that have weight."""
    weights = torch.zeros(2, 3, 128)
    weights[:, 1, 5], weights[:, 1, 90] = 1e-30, 1.0
    picked = logits_of.pick(weights, torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64))
    assert picked.tolist() == [128 + 5, 128 + 90]


def test_rare_tokens_keep_their_share():
    """A token of probability 1e-9 is drawn exactly where the cumulative distribution passes it."""
    scores = torch.zeros(1, 2)
    scores[0, 1] = math.log(1e-9)
    settings_of = Settings(temperature=None, greedy=torch.tensor([], dtype=torch.int64))
    for uniform, token in ((1 - 1.1e-9, 0), (1 - 0.9e-9, 1)):
        assert int(logits_of.sample(scores, settings_of, torch.tensor([uniform], dtype=torch.float64))[0]) == token


def test_low_precision_logits_are_sampled_in_single():
    """bfloat16 logits give logprobs of single precision."""
    scores = torch.randn(1, 50).bfloat16()
    tokens, logprobs = SamplingBatch([stream_of(request_of())], 50, torch.device("cpu")).sample(scores)
    assert logprobs[0] == pytest.approx(float(scores.double().log_softmax(-1)[0, tokens[0]]), abs=1e-5)


def test_score_gives_the_chosen_and_the_largest():
    """Scoring gives log-softmax at the tokens and its largest entries; asking for none gives none."""
    scores = torch.randn(4, 40)
    expected = scores.log_softmax(-1)
    chosen, ids, values = logits_of.score(scores, torch.tensor([3, 0, 39, 7]), 2)
    torch.testing.assert_close(chosen, expected[torch.arange(4), [3, 0, 39, 7]])
    assert ids.tolist() == expected.topk(2).indices.tolist()
    torch.testing.assert_close(values, expected.topk(2).values)
    assert logits_of.score(scores, torch.tensor([3, 0, 39, 7]), 0)[1].shape == (4, 0)
