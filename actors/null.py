"""Workers without a model, for tests and benchmarks of all but the engine (`engine.kind` and `verifier.kind` null).

An answer, and how long it takes, is a pure function of the request: the same for every worker and in any company.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from random import Random

from actors.pool import ElasticPool
from actors.worker import PoolWorker, actor_class
from sapo_ray.cache import local_checkpoint
from sapo_ray.config import RunConfig
from sapo_ray.data import Question
from sapo_ray.errors import SapoError
from sapo_ray.files import Folder
from sapo_ray.models import load_tokenizer
from sapo_ray.requests import Completion, GenerateRequest, ScoreRequest, thread_environment
from sapo_ray.tasks import Chain, ChainConfig
from sapo_ray.tasks.chain import apply

_MISJUDGED = 0.1
"""Share of the right steps that a null verifier scores at random, too."""


class NullWorker(PoolWorker):
    """What both have in common: the task, the tokenizer of a checkpoint, and simulated work."""

    def __init__(self, config: RunConfig, checkpoint: str) -> None:
        assert isinstance(config.task, ChainConfig)  # as the config's checks have it
        self._task, self._simulation, self._checkpoint = Chain(config.task), config.simulation, checkpoint

    def ready(self) -> None:
        self.load(self._checkpoint)

    def load(self, checkpoint: str) -> None:
        """Take over the tokenizer of a checkpoint. Raises SapoError where there is none."""
        if not Folder(checkpoint).has("config.json"):
            raise SapoError(f"no checkpoint to load at {checkpoint}: config.json is missing")
        self._tokenizer = load_tokenizer(local_checkpoint(checkpoint, weights=False))

    async def _work(self, rng: Random, mean: float) -> None:
        """Take a log-normal time of `mean` seconds on average."""
        if mean:
            sigma = self._simulation.sigma
            await asyncio.sleep(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
        self.progress += 1

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class NullReasoner(NullWorker):
    """Goes on with a chain problem's solution, from what the prompt states, and makes mistakes now and then."""

    def __init__(self, config: RunConfig, checkpoint: str) -> None:
        super().__init__(config, checkpoint)
        self._slots = asyncio.Semaphore(config.engine.max_num_seqs)

    async def reset_prefix_cache(self) -> None:
        """There is none."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion | Exception]:
        """The completions of `requests`, in order; in place of one whose prompt is no problem, the reason."""
        return list(await asyncio.gather(*map(self._complete, requests)))

    async def _complete(self, request: GenerateRequest) -> Completion | Exception:
        rng = Random(request.seed)
        try:
            completion = self._answer(request, rng)
        except ValueError as error:
            return ValueError(f"request {request.id}: {error}")
        async with self._slots:
            await self._work(rng, self._simulation.token_seconds * completion.generated_tokens)
        return completion

    def _answer(self, request: GenerateRequest, rng: Random) -> Completion:
        error_rate = self._simulation.error_rate

        def compute(op: str, left: int, right: int, modulus: int) -> int:
            result = apply(op, left, right, modulus)
            return (result + rng.randrange(1, modulus)) % modulus if rng.random() < error_rate else result

        question, *steps = self._task.split(self._text(request.prompt_ids)) or ("",)
        text = "".join(self._task.solve(self._task.parse(question.removesuffix("\n")), steps, compute))
        text = min((text.partition(stop)[0] for stop in request.sampling.stop), key=len, default=text)
        ids = [*self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id]
        made, finished = ids[: request.sampling.max_tokens], len(ids) <= request.sampling.max_tokens
        return Completion(
            id=request.id,
            text=text if finished else self._text(made),
            token_ids=tuple(made),
            finished=finished,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=0,
        )


class NullVerifier(NullWorker):
    """Scores most steps from which the answer can still be reached near 0.9, and all others at random."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[list[float] | Exception]:
        """ĉ_j of every step, one list a trajectory; in place of one whose prompt is no problem, the reason."""
        return list(await asyncio.gather(*map(self._score, requests)))

    async def _score(self, request: ScoreRequest) -> list[float] | Exception:
        encoded = request.encoded
        rng = Random(f"{request.id}:{encoded.ids}")
        bounds = (encoded.prompt_length, *(end + 1 for end in encoded.step_ends))
        steps = [self._text(encoded.ids[start:end]) for start, end in itertools.pairwise(bounds)]
        try:
            reachable = self._reachable(self._text(encoded.ids[: encoded.prompt_length]), steps)
        except ValueError as error:
            return ValueError(f"request {request.id}: {error}")
        judged = [right and rng.random() >= _MISJUDGED for right in reachable]
        scores = [rng.uniform(0.85, 0.95) if right else rng.random() for right in judged]
        await self._work(rng, self._simulation.score_seconds)
        return scores

    def _reachable(self, prompt: str, steps: Sequence[str]) -> tuple[int, ...]:
        text = prompt.removesuffix("\n")
        answer = self._task.answer(self._task.solve(self._task.parse(text)))
        assert answer is not None
        return self._task.oracle(Question("", text, answer), steps).reachable


def null_reasoner_pool(config: RunConfig) -> ElasticPool[GenerateRequest, Completion]:
    """A pool of null reasoners, with the sizes and resources that `engine` gives."""
    actor = actor_class(NullReasoner, config.engine, thread_environment(config.engine))
    return ElasticPool(
        "rollout", lambda checkpoint: actor.remote(config, checkpoint), "generate", config.engine, config.scaling
    )


def null_verifier_pool(config: RunConfig) -> ElasticPool[ScoreRequest, list[float]]:
    """A pool of null verifiers, with the sizes and resources that `verifier` gives."""
    actor = actor_class(NullVerifier, config.verifier, thread_environment(config.verifier))
    return ElasticPool(
        "verifier", lambda checkpoint: actor.remote(config, checkpoint), "score", config.verifier, config.scaling
    )
