"""Responses by an inference engine, which takes the policy's weights before every batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.models.checks import deviation
from torchrl_maxmin.models.full import LanguageNetworks
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sequences import is_end, mask_after_eos, pad_right, undisturbed

__all__ = ["Engine", "EnginePolicy", "Sample", "pad_samples", "probe_tolerance", "row_seeds"]

#: tokens of the response in the row that both models score
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """A response as an engine gives it.

    Attributes:
        tokens: up to and with the one that ended it.
        log_probs: of each in the distribution that it was drawn from.
    """

    tokens: Sequence[int]
    log_probs: Sequence[float]


class Engine(Protocol):
    """Samples responses with weights of its own; how it samples was settled when it was made."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, stop_early: bool = True
    ) -> list[Sample]:
        """Sample a response to each prompt.

        Args:
            prompts: token ids.
            seeds: of every response's own random numbers.
            stop_early: whether the policy's stop strings end a response; the end tokens do in any case.
        """

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights, by the names of a saved model; nothing computed from earlier ones stays in use."""

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of all tokens but the first, each given those before it, at temperature 1."""


def row_seeds(seed: int, batch: int, rows: int) -> list[int]:
    """Seeds of the rows of a batch: a function of the run's seed and of the batch's number alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + batch) * 2 + 1)
    return torch.randint(2**31, (rows,), generator=generator).tolist()


def pad_samples(samples: Sequence[Sample], length: int, pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put responses in columns.

    Args:
        samples: B of them, with at most ``length`` tokens.
        length: columns, R.
        pad_token_id: what fills the rest.

    Returns:
        Tokens int64, the mask of real ones bool, and log-probabilities fp32, zero elsewhere, all [B, R].

    Raises:
        EngineError: for a response that is empty, too long, or without a log-probability of each token.

    Example:
        >>> pad_samples([Sample([5, 2], [-0.5, -1.0]), Sample([7], [-0.25])], 3, 0)[2].tolist()
        [[-0.5, -1.0, 0.0], [-0.25, 0.0, 0.0]]
    """
    for sample in samples:
        if not 1 <= len(sample.tokens) == len(sample.log_probs) <= length:
            raise EngineError(
                f"the engine gave {len(sample.tokens)} tokens with {len(sample.log_probs)} log-probabilities "
                f"for a response of 1 to {length}"
            )
    tokens, mask = pad_right([sample.tokens for sample in samples], pad_token_id)
    short = length - tokens.shape[-1]
    tokens = torch.nn.functional.pad(tokens, (0, short), value=pad_token_id)
    mask = torch.nn.functional.pad(mask, (0, short), value=False)
    log_probs = torch.zeros(mask.shape)
    log_probs[mask] = torch.tensor([value for sample in samples for value in sample.log_probs])
    return tokens, mask, log_probs


def probe_tolerance(dtype: torch.dtype) -> float:
    """How far the log-probabilities of one row may be apart, as ``deviation`` measures it, in nats.

    The largest of a token in float32 (SmolLM2-135M: 5e-5, and 1.2 with a stale output layer); in half
    precision the mean, since single tokens are off by 1 where nothing is wrong (SmolLM2-135M: .05).
    """
    return 0.2 if dtype.itemsize == 2 else 1e-3


class EnginePolicy(TensorDictModuleBase):
    """A policy whose responses an engine samples, with the weights that the policy has at the time.

    Before every batch the weights are pushed, and one row is scored in both models: an engine that still
    answers with earlier weights (a stale cache, a packed copy of an output layer) would train the policy on
    samples of another one.

    Args:
        models: give the policy and its weights.
        engine: samples as the policy does (temperature, ``top_k``, ``top_p``, ends, length).
        prompts: what :func:`~torchrl_maxmin.models.sampling.encode_prompts` gives, the first of which, with a
            response, is scored in both models.
        seed: of the responses.
        version: updates that the policy has behind it.

    Reads ``prompt_tokens`` and ``prompt_mask`` [B, P]; writes what
    :class:`~torchrl_maxmin.models.language.TokenPolicy` does, and ``policy_version`` [B] int64, the number of
    updates behind the policy that answered. The ``sample_log_prob`` are the engine's; with ``top_k`` or
    ``top_p`` the ``whole_log_prob`` are the trainer's, since an engine says nothing of the whole.

    Attributes:
        version: as of the class; each batch is followed by one update.
        gap: how far the two models were apart in the last probe, see :func:`probe_tolerance`.

    Raises:
        UserError: where the engine computes another model than the policy to begin with.
    """

    def __init__(
        self,
        models: LanguageNetworks,
        engine: Engine,
        prompts: TensorDictBase,
        *,
        seed: int = 0,
        version: int = 0,
    ):
        super().__init__()
        self.models, self.engine, self.seed, self.version = models, engine, seed, version
        self.in_keys = models.policy.in_keys
        self.out_keys = [*models.policy.out_keys, "policy_version"]
        self.probe = _probe_row(models.policy, prompts)
        self.gap = 0.0
        try:
            self.push()
        except EngineError as error:
            raise UserError(f"{error}; use --rollout_engine generate for this model") from error

    def push(self) -> None:
        """Give the engine the policy's weights.

        Raises:
            EngineError: where it fails, or does not compute what the policy does afterwards.
        """
        policy = self.models.policy
        with _working("took no weights"):
            self.engine.load(self.models.policy_weights())
        self.gap = self.measure_gap()
        allowed = probe_tolerance(policy.dtype)
        if not self.gap <= allowed:
            raise EngineError(
                "the rollout engine does not compute the policy: after its weights were pushed, "
                f"log-probabilities of one row are {self.gap:.2g} apart; "
                f"{str(policy.dtype).removeprefix('torch.')} allows {allowed:g}"
            )

    @torch.no_grad()
    def measure_gap(self) -> float:
        """Score the probe in both models, with the weights that each has."""
        plain = copy.copy(self.models.policy)
        plain.temperature = 1.0
        own = plain.log_prob(self.probe).cpu()
        tokens = torch.cat([self.probe["prompt_tokens"], self.probe["action"]], -1)
        with _working("scored no row"):
            theirs = torch.tensor([self.engine.score(tokens[0].tolist())])
        return deviation(theirs, own, torch.ones_like(own, dtype=torch.bool), plain.dtype)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Push the weights, and sample a response to every prompt.

        Raises:
            EngineError: where the engine fails.
        """
        self.push()
        policy, prompts = self.models.policy, tensordict["prompt_tokens"]
        rows = [row[real].tolist() for row, real in zip(prompts, tensordict["prompt_mask"], strict=True)]
        columns = self._columns(rows, row_seeds(self.seed, self.version, len(rows)))
        action, mask, log_probs = (column.to(prompts.device) for column in columns)
        tensordict["action"] = action.masked_fill(~mask, policy.pad_token_id)
        tensordict["action_mask"] = mask
        tensordict["sample_log_prob"] = torch.where(mask, log_probs, 0.0)
        tensordict["policy_version"] = torch.full((len(rows),), self.version, device=prompts.device)
        if policy.truncated:
            tensordict["whole_log_prob"] = self.models.log_prob(tensordict)
        self.version += 1
        return tensordict

    def _columns(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], stop_early: bool = True
    ) -> tuple[Tensor, ...]:
        """Tokens, mask up to what ends each response for the policy, and log-probabilities [B, R]."""
        policy = self.models.policy
        with _working("sampled nothing"):
            samples = self.engine.generate(prompts, seeds, stop_early=stop_early)
        action, mask, log_probs = pad_samples(samples, policy.max_new_tokens, policy.pad_token_id)
        ends = is_end(action, policy.ends) & mask
        columns = action, mask & mask_after_eos(action, lambda _: ends), log_probs
        stopped = (~ends.any(-1) & ~mask.all(-1)).nonzero().flatten().tolist()
        if not stopped:
            return columns
        if policy.stops is None or not stop_early:
            raise EngineError(f"the rollout engine left {len(stopped)} responses before their end")
        # its text held a stop string that the policy's does not; the same seeds say how they go on
        again = self._columns([prompts[i] for i in stopped], [seeds[i] for i in stopped], stop_early=False)
        for column, ongoing in zip(columns, again, strict=True):
            column[stopped] = ongoing
        return columns


@contextmanager
def _working(fault: str) -> Iterator[None]:
    """Whatever an engine raises, as one :class:`EngineError`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        words = next(iter(str(error).strip().splitlines()), "no more is known")
        raise EngineError(f"the rollout engine {fault} ({type(error).__name__}: {words})") from error


def _probe_row(policy: TokenPolicy, prompts: TensorDictBase) -> TensorDictBase:
    """A prompt with the policy's response to it, all tokens but the first to be scored: batch size [1]."""
    few = min(_PROBE_TOKENS, policy.max_new_tokens)
    # an engine's context may end with the longest prompt and response, and scoring takes one token more
    longest = max(prompts["prompt_tokens"].shape[-1] + policy.max_new_tokens - 1, 2)
    prompt = prompts[:1].select("prompt_tokens", "prompt_mask").to(next(policy.parameters()).device)
    with undisturbed(policy.model):
        answer = policy(prompt, few)
    kept = (answer["prompt_tokens"][answer["prompt_mask"]], answer["action"][answer["action_mask"]])
    tokens = torch.cat(kept)[:longest].unsqueeze(0)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    parts = {"prompt_tokens": tokens[:, :1], "prompt_mask": mask[:, :1]}
    return TensorDict(parts | {"action": tokens[:, 1:], "action_mask": mask[:, 1:]}, [1])
