"""Settings of the evaluation stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torchrl_maxmin.core.distributed import MODES
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation.results import REFERENCE
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.settings import SamplingSettings
from torchrl_maxmin.models.sharding import shard_policy
from torchrl_maxmin.preferences.chat import ChatSettings

__all__ = ["EvaluateConfig"]


@dataclass
class EvaluateConfig(SamplingSettings, ChatSettings):
    """Results by group of several policies on held-out prompts.

    Args:
        policies: policy folders as name=folder; sft, the reference, must be one of them.
        dataset_name: held-out prompts; file, saved dataset or hub name with a column prompt of strings or
            lists of messages.
        output_dir: folder for the results; must be empty or absent.
        judge: who says what a response is worth to each group; a world's json, module:function
            f(prompts, completions) that gives one column a group, or a reward folder (its heads, by the
            calibration it holds). Or who says which of two is better; module:function f(prompts, a, b), a
            dict of these by group, or the address of an OpenAI-compatible endpoint.
        judge_model: name that the endpoint has for its model; the key is read from OPENAI_API_KEY.
        judge_criteria: what each group wants, as name=words; one judge each at the endpoint.
        judge_timeout: seconds that one request to the endpoint may take, 60 when left out, or one call of a
            judge's function, without limit when left out.
        judge_retries: further attempts at the endpoint after a request that failed; 3 when left out.
        judge_retry_after: most seconds that the endpoint may ask to be left alone before it is asked again;
            60 when left out.
        judge_refusals: what a comparison is that the endpoint refuses by itself (status 400, 413 or 422; too
            long for its model, a content filter); error, or tie, which counts it as one and goes on.
        reward_model_path: the reward mixture that trained the policies; adds its figures, the
            calibration's sensitivity and the certificate.
        certify: policy whose distance to the optimum is certified under that mixture.
        beta: KL weight of the certified objective; by default the one that the policy was trained with.
        certificate_prompts: prompts that the certificate uses, its units; fewer than 16 give none, and the
            fewer the wider it is.
        certificate_samples: responses a prompt, half of the policy, half of the reference; a multiple
            of 4.
        reward_bound: largest size that a calibrated reward of any response can have, a penalty for a
            missing end included; by default responses that nobody drew are taken to be worth no more than
            the best one drawn for their prompt.
        num_samples: responses a prompt of every policy.
        num_prompts: use the first so many prompts; 0 uses all.
        response_length: most tokens of a response.
        max_prompt_length: longest prompt in tokens.
        dataset_split: split of the prompts.
        resume_from_checkpoint: last goes on with the evaluation in output_dir; samples that were drawn, and
            verdicts that an endpoint gave, are in its folder cache.
        seed: seed of the sampling, and the number that the results are filed under.
        device: cpu, cuda or auto.
        distributed: none, or what each of the processes holds that torchrun starts (torchrun --nproc_per_node
            N -m torchrl_maxmin evaluate ...); ddp, all weights, or fsdp2, a part of every policy's. Each
            answers, scores and judges a share of the responses; figures are those of one such process.
    """

    policies: list[str]
    dataset_name: str
    output_dir: str
    judge: str
    judge_model: str | None = None
    judge_criteria: list[str] | None = None
    judge_timeout: float | None = None
    judge_retries: int | None = None
    judge_retry_after: float | None = None
    judge_refusals: str | None = None
    reward_model_path: str | None = None
    certify: str = "maxmin"
    beta: float | None = None
    certificate_prompts: int = 64
    certificate_samples: int = 128
    reward_bound: float | None = None
    num_samples: int = 4
    num_prompts: int = 0
    response_length: int = 53
    max_prompt_length: int = 512
    dataset_split: str = "test"
    resume_from_checkpoint: str | None = None
    seed: int = 0
    device: str = "auto"
    distributed: str = "none"

    def folders(self) -> dict[str, str]:
        """Policy folders by name; raises :class:`UserError` for what is no name=folder."""
        pairs = [spec.partition("=") for spec in self.policies]
        odd = [name for name, _, path in pairs if not path]
        if odd:
            raise UserError(f"--policies takes name=folder; {odd[0]!r} has no folder")
        folders = {name: path for name, _, path in pairs}
        if len(folders) < len(pairs):
            raise UserError("--policies names one twice; give each a name of its own")
        if REFERENCE not in folders:
            raise UserError(f"--policies needs {REFERENCE}=folder, the reference that all are compared with")
        return folders

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        if len(self.folders()) < 2:
            raise UserError(f"--policies needs name=folder of a policy to compare with {REFERENCE}")
        self.require_seed()
        self.require_known(distributed=MODES)
        self.check_sampling()
        self.require_at_least(1, "num_samples", "response_length", "max_prompt_length", "certificate_prompts")
        self.require_at_least(0, "num_prompts")
        self.require_positive("beta", "reward_bound", "judge_timeout")
        self.require_at_least(0, "judge_retries", "judge_retry_after")
        if self.judge_refusals is not None:
            self.require_known(judge_refusals=("error", "tie"))
        if self.resume_from_checkpoint is not None:
            self.require_known(resume_from_checkpoint=("last",))
        named = self.certify != type(self).certify
        given = {"certify": named, "beta": self.beta, "reward_bound": self.reward_bound}
        flags = [f"--{name}" for name, value in given.items() if value]
        if flags and not self.reward_model_path:
            flag = flags[0]
            raise UserError(f"{flag} needs --reward_model_path, whose certificate it is about")
        if named and self.certify not in self.folders():
            raise UserError(f"--certify {self.certify!r} is none of --policies: {', '.join(self.folders())}")
        if self.certificate_samples < 4 or self.certificate_samples % 4:
            raise UserError("--certificate_samples must be a positive multiple of 4")

    def load_policy(self, path: str, tokenizer: Any, device: torch.device) -> TokenPolicy:
        """Load a policy as it is to sample."""
        options = self.sampling_options()
        policy = TokenPolicy.from_pretrained(
            path, tokenizer, max_new_tokens=self.response_length, device=device, **options
        )
        if self.distributed == "fsdp2":
            shard_policy(policy)
        return policy
