"""The ``SamplingClient``: sample and score with one set of weights of a sampler.

A light view of its service's connection: no thread and no file of its own, so making one per training step is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, final

from tg_tinker.core.call import Call, Flow, call
from tg_tinker.core.compose import wait_for_version
from tg_tinker.core.reply import Reply
from tg_tinker.core.retrieval import LoopsRetrieval
from tg_tinker.core.run import RunCore
from tg_tinker.core.service import ServiceCore
from tg_tinker.errors import ServerError
from tg_tinker.faces import blocking, twin
from tg_tinker.loops import plane
from tg_tinker.loops.closing import Closing
from tg_tinker.tokenizer import Tokenizers
from tg_tinker.types import arguments, checks
from tg_tinker.types.loops import ModelInput, SamplingParams, prompt_of
from tg_tinker.types.loops_results import SampleResponse
from tg_tinker.wire import completions, headers, loops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SamplingClient"]

_MOST_SAMPLES = 1024
_MOST_TOP_LOGPROBS = 20
_SCORING = SamplingParams(max_tokens=1)


@final
class SamplingClient(Closing):
    """Samples of one base model, published version or checkpoint; from ``ServiceClient`` or ``TrainingClient``.

    A pinned client is served by its version or a newer one (``X-Min-Policy-Version``), and by exactly its own where the
    server offers that, as ours does.
    """

    def __init__(
        self,
        service: ServiceCore,
        sampler: loops.Sampler,
        tokenizers: Tokenizers,
        *,
        timeout: float,
        ready_timeout: float = 600.0,
        pinned: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        identity = {headers.RUN_ID: run_id} if run_id else {headers.SAMPLER_ID: sampler.id}
        core = RunCore(
            service,
            LoopsRetrieval(sampler.base_url),
            name=f"sampler {sampler.id}",
            headers={**identity, **(pinned or {})},
        )
        super().__init__(core)
        self._sampler = sampler
        self._tokenizers = tokenizers
        self._timeout = timeout
        self._ready_timeout = ready_timeout
        self._pinned = dict(pinned or {})

    def __repr__(self) -> str:
        """The base model, and what it is pinned to."""
        version = self._pinned.get(headers.MIN_POLICY_VERSION)
        pin = self.checkpoint_path or (f"version {version}" if version else "")
        return f"<SamplingClient of {self._sampler.base_model}{f', {pin}' if pin else ''}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what to do instead."""
        raise TypeError(
            "a SamplingClient cannot be pickled: call service.create_sampling_client(model_path=...) over there"
        )

    @property
    def min_policy_version(self) -> int | None:
        """The version that it is pinned to."""
        version = self._pinned.get(headers.MIN_POLICY_VERSION)
        return None if version is None else int(version)

    @property
    def checkpoint_path(self) -> str | None:
        """The ``bt://loops:<run>/sampler_weights/<name>`` URI that it is pinned to."""
        return self._pinned.get(headers.CHECKPOINT_PATH)

    # -------------------------------------------------------------------------------------------- sampling

    @blocking
    def sample(
        self,
        prompt: ModelInput | Sequence[int],
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        affinity_key: str | None = None,
    ) -> Call[SampleResponse]:
        """Generate ``num_samples`` completions of a prompt of token ids.

        Log probabilities are natural, scaled by the temperature, and taken before top-k and top-p.
        ``topk_prompt_logprobs`` (0 to 20) adds the best tokens at each position of the prompt. ``affinity_key`` keeps a
        conversation on one replica.

        Raises ``InvalidRequestError`` naming the field.
        """
        asked = prompt_of(prompt)
        if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
            raise checks.refuse("sampling_params", "a SamplingParams, or None", sampling_params)
        if not isinstance(include_prompt_logprobs, bool):
            raise checks.refuse("include_prompt_logprobs", "True or False", include_prompt_logprobs)
        body = completions.request_body(
            asked,
            sampling_params or SamplingParams(),
            num_samples=arguments.whole("num_samples", num_samples, 1, _MOST_SAMPLES),
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=arguments.whole("topk_prompt_logprobs", topk_prompt_logprobs, 0, _MOST_TOP_LOGPROBS),
        )
        return self._request(asked, body, affinity_key, _answer)

    sample_async = twin(sample)

    @blocking
    def compute_logprobs(
        self, prompt: ModelInput | Sequence[int], *, affinity_key: str | None = None
    ) -> Call[list[float | None]]:
        """Return the log probability of each token of a prompt given those before it; the first has none.

        Raises ``InvalidRequestError`` naming the field.
        """
        asked = prompt_of(prompt)
        body = completions.request_body(asked, _SCORING, prompt_logprobs=True)
        return self._request(asked, body, affinity_key, _prompt_logprobs)

    compute_logprobs_async = twin(compute_logprobs)

    def _request(self, prompt: ModelInput, body: dict[str, Any], affinity: object, read: Any) -> Call[Any]:
        if affinity is not None and not (isinstance(affinity, str) and affinity):
            raise checks.refuse("affinity_key", "a non-empty string, or None", affinity)
        return call(
            loops.SAMPLE,
            body,
            base=self._sampler.base_url,
            headers={headers.AFFINITY: affinity} if isinstance(affinity, str) else {},
            decode=partial(read, prompt),
            whole_reply=True,
            timeout=self._timeout,
        )

    # ------------------------------------------------------------------------------------------- the rest

    @blocking
    def get_tokenizer(self) -> Flow[PreTrainedTokenizerBase]:
        """Return the base model's tokenizer, as the server serves it; cached after the first time."""
        return Flow(
            operation="get_tokenizer", steps=partial(self._tokenizers.get, self._core, self._sampler.base_model)
        )

    get_tokenizer_async = twin(get_tokenizer)

    def get_base_model(self) -> str:
        """Name the base model; no round trip."""
        return self._sampler.base_model

    @blocking
    def ensure_ready(self, ready_timeout: float | None = None) -> Flow[None]:
        """Wait until the sampler serves what this client is pinned to, ``ready_timeout`` seconds at most.

        Raises ``SamplerNotReadyError`` where it does not.
        """
        seconds = self._ready_timeout if ready_timeout is None else ready_timeout
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise checks.refuse("ready_timeout", "a number of seconds greater than 0, or None", ready_timeout)
        return Flow(operation="ensure_ready", steps=partial(self._wait, float(seconds)))

    ensure_ready_async = twin(ensure_ready)

    async def _wait(self, seconds: float) -> None:
        minimum = self.min_policy_version or 0

        async def serving(hold: float) -> int:
            return (await plane.served_version(self._core, self._sampler.base_url, minimum, hold))[0]

        await wait_for_version(serving, minimum, ceiling=seconds)


def _answer(prompt: ModelInput, reply: Reply) -> SampleResponse:
    return completions.read_response(reply.json(), reply.headers, prompt.to_ints())


def _prompt_logprobs(prompt: ModelInput, reply: Reply) -> list[float | None]:
    scored = _answer(prompt, reply).prompt_logprobs
    if scored is None:
        raise ServerError("the sampler's answer scores no prompt", code="BAD_ANSWER")
    return list(scored)
