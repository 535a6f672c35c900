"""Rollouts of a language model: responses by ``generate`` of Hugging Face, and their group rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector

from torchrl_maxmin.core.distributed import is_main_process, of_every_process, of_main_process, over_ranks
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.finite import nonfinite_batch
from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.envs import TokenEnv
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.sampling import rows_at_once
from torchrl_maxmin.models.sequences import Ends, in_length_buckets, penalise_missing_eos
from torchrl_maxmin.rewards import Calibration
from torchrl_maxmin.rewards.calibration import mean_of_present
from torchrl_maxmin.rewards.source import NonFiniteRewards, fill_absent, reference_rewards

__all__ = ["CalibratedRewards", "LanguageRollouts", "token_env"]


class CalibratedRewards:
    """Group rewards [B, K] of responses, on the scale on which groups are compared.

    Args:
        source: gives raw rewards [B, K]; NaN where there is none.
        ends: what ends a response, see :attr:`~torchrl_maxmin.models.language.TokenPolicy.ends`.
        missing_eos_penalty: taken from every group's reward of a response that does not end.
        scoring_batch_size: most responses scored at once.
        folder: where a batch with a NaN goes.

    Attributes:
        calibration: what raw rewards are mapped by.
        baseline: the reference's mean calibrated reward [N, K] for every prompt, subtracted; or None.
        samples: raw rewards [N, n, K] of reference samples of every prompt, for win rates; or None.
        neutral: what all responses of a batch count as for a group [K] that none has a reward for.
    """

    def __init__(
        self,
        source: Any,
        *,
        ends: Ends,
        missing_eos_penalty: float = 0.0,
        scoring_batch_size: int = 512,
        folder: Path,
    ):
        self.source, self.ends = source, ends
        self.missing_eos_penalty, self.scoring_batch_size = missing_eos_penalty, scoring_batch_size
        self.folder = folder
        self.calibration = Calibration.identity(source.num_groups)
        self.baseline: Tensor | None = None
        self.samples: Tensor | None = None
        self.neutral = torch.zeros(source.num_groups)
        self._silent: set[int] = set()

    def fit(
        self,
        reference: TokenPolicy,
        prompts: TensorDict,
        method: str,
        *,
        num_prompts: int,
        num_samples: int,
        baseline_samples: int,
        by_prompt: bool,
    ) -> None:
        """Fit the calibration on samples of the reference policy; the raw rewards are kept in the folder.

        Samples for every prompt are drawn where prompts count one by one: where the calibration says so
        (:attr:`~torchrl_maxmin.rewards.Calibration.by_prompt`), and with ``by_prompt``, for a minimum taken
        response by response, which takes the reference's mean off as it is.

        Raises:
            UserError: where the method cannot be had from the samples.
        """
        device = next(reference.parameters()).device

        def sampled(some: TensorDict, count: int) -> Tensor:
            return reference_rewards(reference, some, self.source, count, self.scoring_batch_size)

        order = of_main_process(lambda: torch.randperm(len(prompts)))
        raw = sampled(prompts[order[:num_prompts]], num_samples)
        mixture = getattr(self.source, "mixture", None)  # functions compute in what they give
        dtype = None if mixture is None else next(mixture.parameters()).dtype
        self.calibration = Calibration.fit(raw, method, dtype=dtype)
        if is_main_process():
            save_file({"rewards": raw.contiguous()}, self.folder / "reference_rewards.safetensors")
        if by_prompt or self.calibration.by_prompt:
            together = math.lcm(rows_at_once(reference), baseline_samples)  # whole batches sample alike
            parts = prompts.split(together // baseline_samples)
            with progress_bar("sampling the reference", len(parts)) as advance:
                rewards = []
                for part in parts:
                    rewards.append(sampled(part, baseline_samples))
                    advance()
            every = torch.cat(rewards)
            if method == "win_rate":
                self.samples = every.to(device)
            else:
                self.baseline = self.calibration.baseline(every, shrink=not by_prompt).to(device)
        if not by_prompt or method == "win_rate":
            self.neutral = self.calibration.apply(mean_of_present(raw, (0, 1)))

    def __call__(self, responses: TensorDictBase) -> Tensor:
        """Score responses.

        Raises:
            FloatingPointError: for a reward that is NaN or infinite; the batch is saved.
            RewardError: where rewards cannot be had.
        """
        try:
            raw = over_ranks(self._score, responses)
        except NonFiniteRewards as error:
            raise nonfinite_batch(responses, self.folder, "a reward is nan") from error
        own = None if self.samples is None else self.samples[responses["prompt_index"]]
        rewards = self.calibration.apply(raw, own)
        if self.baseline is not None:
            rewards = rewards - self.baseline[responses["prompt_index"]]
        if bool(rewards.isnan().any()):
            self._name_silent_groups(rewards)
            rewards = fill_absent(rewards, self.neutral)
        return penalise_missing_eos(rewards, responses, self.ends, self.missing_eos_penalty)

    def _score(self, responses: TensorDictBase) -> Tensor:
        return of_every_process(in_length_buckets, self.source, responses, self.scoring_batch_size)

    def _name_silent_groups(self, rewards: Tensor) -> None:
        """Print, once each, the groups that no response of a batch has a reward for."""
        silent = set(rewards.isnan().all(0).nonzero().flatten().tolist()) - self._silent
        self._silent |= silent
        if silent:
            console.print(
                f"no response of a batch has a reward for group(s) {sorted(silent)}: each counts as the "
                "reference's mean, and gives no signal",
                markup=False,
                soft_wrap=True,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs."""
        return {
            "calibration": self.calibration.to_dict(),
            "baseline": self.baseline,
            "samples": self.samples,
            "neutral": self.neutral,
        }

    def load_state_dict(self, state: dict[str, Any], method: str) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            UserError: where the rewards were calibrated by another method.
        """
        self.calibration, self.baseline = Calibration.from_dict(state["calibration"]), state["baseline"]
        self.neutral, self.samples = state.get("neutral", self.neutral), state.get("samples")
        if self.calibration.method != method:
            raise UserError(
                f"the checkpoint's rewards are calibrated by {self.calibration.method}: resume with "
                f"--calibration {self.calibration.method}, or start another run for {method}"
            )


def token_env(
    policy: TokenPolicy,
    rewards: CalibratedRewards,
    prompts: TensorDict,
    *,
    batch_size: int,
    num_generations: int,
    minimum: bool,
    seed: int,
    start: int,
) -> TokenEnv:
    """The environment of a policy's rollouts; arguments as of :class:`LanguageRollouts`."""
    env = TokenEnv(
        prompts,
        rewards,
        num_groups=rewards.source.num_groups,
        num_prompts=batch_size // num_generations,
        num_generations=num_generations,
        max_new_tokens=policy.max_new_tokens,
        eos_token_id=policy.ends,
        vocab_size=policy.model.get_input_embeddings().num_embeddings,
        minimum=minimum,
        seed=seed,
        device=next(policy.parameters()).device,
    )
    env.batch_index = start  # the order of prompts follows from it
    return env


class LanguageRollouts:
    """Batches [B] of prompts, responses and rewards by the policy as it is at the time.

    Args:
        policy: samples the responses.
        rewards: scores them.
        prompts: what :func:`~torchrl_maxmin.models.sampling.encode_prompts` gives.
        batch_size: responses a batch, B.
        num_batches: batches in all.
        num_generations: responses to every prompt.
        minimum: reward with the least of a response's group rewards.
        seed: of the order of prompts.
        start: batches that were drawn before.
        trial: let the collector sample a batch that is thrown away when it is made. It moves the random
            numbers: runs of full copies, whose figures are published, go on as they began.
        sampler: samples in place of the policy, as it does; the policy itself when None.

    A batch holds what :class:`~torchrl_maxmin.envs.TokenEnv` and the policy write.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        rewards: CalibratedRewards,
        prompts: TensorDict,
        *,
        batch_size: int,
        num_batches: int,
        num_generations: int = 1,
        minimum: bool = False,
        seed: int = 0,
        start: int = 0,
        trial: bool = True,
        sampler: TensorDictModuleBase | None = None,
    ):
        self.rewards, self.prompts = rewards, prompts
        self.env = token_env(
            policy,
            rewards,
            prompts,
            batch_size=batch_size,
            num_generations=num_generations,
            minimum=minimum,
            seed=seed,
            start=start,
        )
        self.collector = Collector(
            self.env,
            policy if sampler is None else sampler,
            frames_per_batch=batch_size,
            total_frames=batch_size * max(num_batches - start, 1),
            auto_register_policy_transforms=False,
            use_buffers=None if trial else False,  # what the trial is for
        )

    def __iter__(self) -> Iterator[TensorDictBase]:
        for rollout in self.collector:
            yield rollout[:, 0] if rollout.ndim == 2 else rollout  # an episode is one step

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """The state to go on from after so many batches."""
        return self.rewards.state_dict()

    def close(self) -> None:
        """Free what the collector holds."""
        self.collector.shutdown(close_env=False)
