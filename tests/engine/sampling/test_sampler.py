from __future__ import annotations

import math
import random

import pytest
import torch

from tg_tinker.engine.sampling.sampler import Sampler
from tg_tinker.engine.sampling.slots.key_value_cache import Pool
from tg_tinker.engine.sampling.slots.slot_decoder import SlotDecoder
from tg_tinker.errors import InvalidRequestError, OperationFailedError, ServerError


@pytest.fixture(scope="module")
def base(kit):
    """One model for the tests of behaviour."""
    return kit.base("llama")


def test_a_stream_is_its_generation(kit, base):
    """What a listener hears token by token is what it gets at the end, and nothing is heard afterwards."""
    sampler = Sampler(base)
    (recorder,) = kit.submit(sampler, kit.request(kit.prompt(7), max_tokens=40))
    kit.drain(sampler)
    own = recorder.result
    assert (own.tokens, own.logprobs) == (tuple(recorder.tokens), tuple(recorder.logprobs))
    assert own.text == "".join(recorder.pieces) == base.tokenizer.decode(own.tokens, skip_special_tokens=True)
    assert (len(own.tokens), own.finish_reason, own.prompt_logprobs) == (40, "length", None)
    assert all(logprob <= 0 for logprob in own.logprobs)
    assert not sampler.busy


def test_one_token_a_tick_for_everybody(kit, base):
    """Each step gives every admitted request one token; a request that arrives joins with the next step."""
    sampler = Sampler(base)
    first, second = kit.submit(sampler, kit.request(kit.prompt(3)), kit.request(kit.prompt(50)))
    sampler.step()
    assert (len(first.tokens), len(second.tokens)) == (1, 1)
    sampler.step()
    (third,) = kit.submit(sampler, kit.request(kit.prompt(9)))
    sampler.step()
    assert [len(recorder.tokens) for recorder in (first, second, third)] == [3, 3, 1]
    sampler.step()
    assert [len(recorder.tokens) for recorder in (first, second, third)] == [4, 4, 2]


def test_a_short_request_beside_a_long_one_ends_first(kit, base):
    """A short request that arrives while a long one runs takes its own number of ticks, no more."""
    sampler = Sampler(base)
    (long,) = kit.submit(sampler, kit.request(kit.prompt(5), max_tokens=200))
    for _ in range(20):
        sampler.step()
    (short,) = kit.submit(sampler, kit.request(kit.prompt(6), max_tokens=8))
    for _ in range(8):
        sampler.step()
    assert short.ended
    assert len(long.tokens) == 28


def test_a_long_prompt_does_not_stall_running_streams(kit, base):
    """A prompt longer than a tick's budget is read in pieces; others get a token each tick, and short prompts pass."""
    sampler = Sampler(base)
    (running,) = kit.submit(sampler, kit.request(kit.prompt(5), max_tokens=60))
    sampler.step()
    (long,) = kit.submit(sampler, kit.request(kit.prompt(400), max_tokens=5))
    sampler.step()
    assert (len(running.tokens), len(long.tokens)) == (2, 0)
    (short,) = kit.submit(sampler, kit.request(kit.prompt(30), max_tokens=5))
    sampler.step()
    assert (len(running.tokens), len(long.tokens), len(short.tokens)) == (3, 1, 1)
    kit.drain(sampler)
    assert long.result.tokens == kit.run(Sampler(base), kit.request(kit.prompt(400), max_tokens=5))[0].tokens


def test_requests_wait_for_a_slot_in_order(kit, base):
    """With every slot taken the others wait, and get places first come, first served."""
    sampler = Sampler(base, slots=2)
    recorders = kit.submit(sampler, *(kit.request(kit.prompt(4 + n), max_tokens=3 + n) for n in range(5)))
    order = []
    while sampler.busy:
        sampler.step()
        assert sum(bool(r.tokens) and not r.ended for r in recorders) <= 2
        order += [n for n, recorder in enumerate(recorders) if recorder.ended and n not in order]
    assert order == [0, 1, 2, 3, 4]


def test_requests_join_a_pool_that_has_shrunk(kit, base):
    """After most of a crowd has ended, the places that are left take newcomers, and nobody's tokens change."""
    sampler = Sampler(base)
    crowd = kit.submit(sampler, *(kit.request(kit.prompt(4), max_tokens=3, seed=n) for n in range(20)))
    (stays,) = kit.submit(sampler, kit.request(kit.prompt(5), max_tokens=30))
    while not all(recorder.ended for recorder in crowd):
        sampler.step()
    for _ in range(3):  # the pool gives rows back as it decodes on
        sampler.step()
    (late,) = kit.submit(sampler, kit.request(kit.prompt(6), max_tokens=10))
    kit.drain(sampler)
    assert late.result.tokens == kit.run(Sampler(base), kit.request(kit.prompt(6), max_tokens=10))[0].tokens
    assert stays.result.tokens == kit.run(Sampler(base), kit.request(kit.prompt(5), max_tokens=30))[0].tokens


@pytest.mark.parametrize("ticks", [0, 1, 2, 5])
def test_cancel_frees_the_slot_at_once(kit, base, ticks):
    """Cancelling works while waiting, while the prompt is read and while tokens come; a second time it is False."""
    sampler = Sampler(base, slots=1)
    recorder, waiting = kit.Recorder(), kit.Recorder()
    handle = sampler.submit(kit.request(kit.prompt(450), max_tokens=50), recorder)
    sampler.submit(kit.request(kit.prompt(3), max_tokens=2), waiting)
    for _ in range(ticks):
        sampler.step()
    heard = len(recorder.tokens)
    assert sampler.cancel(handle)
    assert not sampler.cancel(handle)
    assert not sampler.cancel(12345)
    sampler.step()
    assert len(waiting.tokens) == 1
    kit.drain(sampler)
    assert len(recorder.tokens) == heard
    assert not recorder.ended
    assert waiting.ended


def test_cancelling_one_of_equal_prompts_leaves_the_others(kit, base):
    """A shared prompt goes on being read for those who still want it, and is dropped when nobody does."""
    sampler = Sampler(base)
    recorders = [kit.Recorder() for _ in range(3)]
    (running,) = kit.submit(sampler, kit.request(kit.prompt(3), max_tokens=6))
    sampler.step()
    handles = [sampler.submit(kit.request(kit.prompt(400), seed=n), r) for n, r in enumerate(recorders)]
    sampler.step()
    sampler.cancel(handles[0])
    sampler.step()
    assert [len(r.tokens) for r in recorders] == [0, 1, 1]
    sampler.cancel(handles[1])
    sampler.cancel(handles[2])
    kit.drain(sampler)
    assert running.ended


def test_greedy_ends_at_the_end_token(kit):
    """The end token ends a completion, is among its tokens and not in its text."""
    base = kit.base("llama")
    (free,) = kit.run(Sampler(base), kit.request(kit.prompt(6), temperature=0.0, max_tokens=30))
    end = free.tokens[11]
    first = free.tokens.index(end)
    ending = kit.base("llama", eos=frozenset({end}))
    (own,) = kit.run(Sampler(ending), kit.request(kit.prompt(6), temperature=0.0, max_tokens=30))
    assert (own.tokens, own.finish_reason) == (free.tokens[: first + 1], "eos")
    assert own.text == base.tokenizer.decode(free.tokens[:first], skip_special_tokens=True)
    asked = kit.request(kit.prompt(6), temperature=0.0, max_tokens=30, stop_token_ids=frozenset({end}))
    for model in (base, ending):
        (stopped,) = kit.run(Sampler(model), asked)
        assert (stopped.tokens, stopped.text, stopped.finish_reason) == (own.tokens, own.text, "stop")


def test_stop_texts_end_and_are_cut(kit, base):
    """A completion ends with the token that completes a stop text; the text before it is what comes back."""
    found = 0
    for seed in range(30):
        prompt = kit.prompt(5, seed)
        (free,) = kit.run(Sampler(base), kit.request(prompt, max_tokens=40, seed=seed))
        middle = [place for place in range(5, 35) if all(32 < token < 127 for token in free.tokens[place : place + 2])]
        if not middle:
            continue
        stop = base.tokenizer.decode(free.tokens[middle[0] : middle[0] + 2])
        (own,) = kit.run(Sampler(base), kit.request(prompt, max_tokens=40, seed=seed, stop=("never", stop)))
        assert own.finish_reason == "stop"
        assert own.text == free.text[: free.text.index(stop)]
        assert own.tokens == free.tokens[: len(own.tokens)]
        assert stop in base.tokenizer.decode(own.tokens, skip_special_tokens=True)
        assert stop not in base.tokenizer.decode(own.tokens[:-1], skip_special_tokens=True)
        found += 1
    assert found >= 5


def test_the_models_length_ends_a_completion(kit, base):
    """The room that a prompt leaves caps max_tokens; a prompt that leaves none is refused with the limit."""
    sampler = Sampler(base, max_length=40)
    (own,) = kit.run(sampler, kit.request(kit.prompt(30), max_tokens=1000))
    assert (len(own.tokens), own.finish_reason) == (10, "length")
    (last,) = kit.run(sampler, kit.request(kit.prompt(39), max_tokens=1000))
    assert len(last.tokens) == 1
    with pytest.raises(InvalidRequestError, match="40") as raised:
        sampler.submit(kit.request(kit.prompt(40)), kit.Recorder())
    assert (raised.value.field, raised.value.constraint) == ("prompt", "1 to 39 tokens")
    sampler.submit(kit.request(kit.prompt(40), prompt_logprobs=True, max_tokens=0), kit.Recorder())
    kit.drain(sampler)


def test_the_whole_length_of_the_model_is_used(kit, base):
    """A completion may fill the model's length to its last token."""
    (own,) = kit.run(Sampler(base), kit.request(kit.prompt(450), max_tokens=100, temperature=0.0))
    naive, clear = kit.greedy(base, None, (*kit.prompt(450), *own.tokens[:60]), 2)
    assert len(own.tokens) == 62
    assert clear == 2
    assert list(own.tokens[60:]) == naive


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ()),
        ("prompt", (1, 262)),
        ("prompt", (1, -1)),
        ("prompt", (1, 2.0)),
        ("prompt", (True,)),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 1.0),
        ("stop", ("",)),
        ("stop", "text"),
        ("stop_token_ids", frozenset({262})),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("topk_prompt_logprobs", -1),
        ("topk_prompt_logprobs", 263),
    ],
)
def test_bad_requests_name_the_field(kit, base, field, value):
    """Every wrong value is refused at submit, with the field and what was expected, and nothing is left behind."""
    sampler = Sampler(base)
    with pytest.raises(InvalidRequestError) as raised:
        sampler.submit(kit.request(**{"prompt": (1, 2), field: value}), kit.Recorder())
    assert raised.value.field == field
    assert raised.value.constraint
    assert not sampler.busy


@pytest.mark.parametrize("moment", ["on_token", "on_done", "on_error"])
def test_a_listener_that_raises_hurts_nobody(kit, base, moment, caplog):
    """A listener that raises ends its own request, which is logged and told; the others say what they would have."""
    broken = kit.Recorder()

    def fail(*_news):
        raise ValueError(moment)

    setattr(broken, moment, fail)
    if moment == "on_error":  # the news of a failure fails as well: there is nobody left to tell
        broken.on_token = fail
    sampler = Sampler(base, slots=3)
    sampler.submit(kit.request(kit.prompt(5), max_tokens=3), broken)
    requests = [kit.request(kit.prompt(5 + n), seed=n) for n in range(1, 4)]
    others = kit.submit(sampler, *requests)
    kit.drain(sampler)
    alone = kit.run(Sampler(base), *requests)
    assert [other.result.tokens for other in others] == [own.tokens for own in alone]
    assert "its listener failed" in caplog.text
    assert moment == "on_error" or isinstance(broken.error, OperationFailedError)


def test_listeners_may_submit_and_cancel(kit, base):
    """A listener can cancel any request, its own included, and hand in another, in the middle of a tick."""
    sampler = Sampler(base)
    handles = {}
    victim, follow_up = kit.Recorder(), kit.Recorder()

    class Busy(kit.Recorder):
        def on_token(self, token_id, logprob, text):
            super().on_token(token_id, logprob, text)
            if len(self.tokens) == 3:
                assert sampler.cancel(handles["victim"])
                sampler.submit(kit.request(kit.prompt(4), max_tokens=2), follow_up)
                assert sampler.cancel(handles["own"])

    busy = Busy()
    handles["own"] = sampler.submit(kit.request(kit.prompt(5)), busy)
    handles["victim"] = sampler.submit(kit.request(kit.prompt(6)), victim)
    kit.drain(sampler)
    assert (len(busy.tokens), len(victim.tokens), len(follow_up.tokens)) == (3, 2, 2)
    assert (busy.ended, victim.ended, follow_up.ended) == (False, False, True)


@pytest.mark.parametrize(
    ("failure", "expected", "code"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ServerError, "OUT_OF_MEMORY"),
        (MemoryError(), ServerError, "OUT_OF_MEMORY"),
        (RuntimeError("a kernel failed"), OperationFailedError, "OPERATION_FAILED"),
    ],
)
@pytest.mark.parametrize("where", ["decode", "prefill", "join", "grow"])
def test_an_engine_failure_fails_those_it_concerns(kit, base, monkeypatch, where, failure, expected, code):
    """A failing pass is a typed error for its requests; those that wait, and the sampler, go on."""
    sampler = Sampler(base, slots=1, prefix_cache_bytes=0)
    original = getattr(SlotDecoder, where)
    left = [failure]

    def failing(self, *values):
        if left:
            raise left.pop()
        return original(self, *values)

    monkeypatch.setattr(SlotDecoder, where, failing)
    hit, later = kit.submit(sampler, kit.request(kit.prompt(3), max_tokens=200), kit.request(kit.prompt(5)))
    kit.drain(sampler)
    assert isinstance(hit.error, expected)
    assert hit.error.code == code
    assert later.result.tokens == kit.run(Sampler(base), kit.request(kit.prompt(5)))[0].tokens


@pytest.mark.parametrize("begun", [0, 3])
def test_requests_that_end_together_leave_nothing_behind(kit, base, monkeypatch, begun):
    """Where one of several finds no memory, at its start or later, its listener may cancel the rest; others go on."""
    sampler, errors, handles = Sampler(base, prefix_cache_bytes=0), [], []
    original, rows = Pool.take_row, []

    def failing(pool):
        rows.append(pool)
        if len(rows) == begun + 1:
            raise MemoryError
        return original(pool)

    class Together:
        def on_token(self, *news): ...

        def on_done(self, generation): ...

        def on_error(self, error):
            errors.append(error.code)
            for handle in handles:
                sampler.cancel(handle)

    monkeypatch.setattr(Pool, "take_row", failing)
    request = kit.request(kit.prompt(3), max_tokens=200)
    handles += [sampler.submit(request, Together()) for _ in range(3)]
    kit.drain(sampler)
    assert (errors, sampler._running) == (["OUT_OF_MEMORY"], {})
    (later,) = kit.run(sampler, kit.request(kit.prompt(5)))
    assert later.tokens == kit.run(Sampler(base), kit.request(kit.prompt(5)))[0].tokens


def test_a_diverged_adapter_fails_alone(kit, base):
    """An adapter with NaN fails its own requests with a reason, scored prompts too; its neighbours are untouched."""
    sick = kit.adapter(base, 1)
    for _, b in sick.layers.values():
        b.fill_(math.nan)
    sampler = Sampler(base)
    good = kit.request(kit.prompt(6), adapter=kit.adapter(base, 2))
    bad, scored, healthy = kit.submit(
        sampler,
        kit.request(kit.prompt(5), adapter=sick),
        kit.request(kit.prompt(5), adapter=sick, prompt_logprobs=True),
        good,
    )
    kit.drain(sampler)
    for recorder in (bad, scored):
        assert isinstance(recorder.error, OperationFailedError)
        assert "not finite" in recorder.error.message
    assert healthy.result.tokens == kit.run(Sampler(base), good)[0].tokens


def test_the_coldest_temperature_is_greedy(kit, base):
    """A temperature that single precision cannot tell from 0 takes the most probable token, and is no failure."""
    cold, greedy = (kit.request(kit.prompt(6), temperature=heat, max_tokens=20) for heat in (1e-308, 0.0))
    (drawn,), (taken,) = kit.run(Sampler(base), cold), kit.run(Sampler(base), greedy)
    assert drawn.tokens == taken.tokens


def test_penalties_change_what_is_said(kit, base):
    """A heavy repetition penalty never repeats where the model alone does."""
    plain = kit.request(kit.prompt(4), temperature=0.0, max_tokens=60)
    (free,) = kit.run(Sampler(base), plain)
    punished = kit.request(kit.prompt(4), temperature=0.0, max_tokens=60, frequency_penalty=1000.0)
    (own,) = kit.run(Sampler(base), punished)
    assert len(set(free.tokens)) < 60
    assert len(set(own.tokens)) == 60


def test_anything_at_random_ends_well(kit, base):
    """Five hundred requests of every kind, arriving, cancelled and failing at random, all end as they should."""
    dice = random.Random(4)
    versions = [kit.adapter(base, n) for n in range(5)] + [None]
    sampler = Sampler(base, slots=7, prefix_cache_bytes=1 << 20)
    open_handles, recorders, cancelled = {}, [], set()
    while len(recorders) < 500 or sampler.busy:
        for _ in range(dice.randrange(4) if len(recorders) < 500 else 0):
            request = kit.request(
                kit.prompt(dice.choice([1, 2, 17, 64, 100])),
                adapter=dice.choice(versions),
                max_tokens=dice.randrange(1, 20),
                seed=dice.randrange(1000),
                temperature=dice.choice([0.0, 1.0, 0.5]),
                top_p=dice.choice([1.0, 0.8]),
                presence_penalty=dice.choice([0.0, 0.0, 0.5]),
                prompt_logprobs=dice.random() < 0.1,
                stop=dice.choice([(), ("e",)]),
            )
            recorder = kit.Recorder()
            open_handles[sampler.submit(request, recorder)] = recorder
            recorders.append((request, recorder))
        if dice.random() < 0.1 and open_handles:
            handle = dice.choice(list(open_handles))
            recorder = open_handles.pop(handle)
            assert sampler.cancel(handle) is not recorder.ended
            cancelled.add(recorder) if not recorder.ended else None
        sampler.step()
    for request, recorder in recorders:
        assert recorder.ended is not (recorder in cancelled), request
        if recorder.generation is not None:
            assert recorder.generation.finish_reason in ("length", "stop")
            assert len(recorder.tokens) <= request.max_tokens
    assert torch.is_inference_mode_enabled() is False
