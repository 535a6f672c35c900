"""Settings of a plan: those of the planned stage that matter, and what there is to run it on."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.settings import CheckedSettings
from torchrl_maxmin.models.loading import load_config
from torchrl_maxmin.rewards.adapters import ADAPTERS
from torchrl_maxmin.trainers.plan_messages import Link
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward_config import RewardConfig
from torchrl_maxmin.trainers.sft import SFTConfig

__all__ = ["GB", "PlanConfig"]

GB = 1e9
_STAGES: dict[str, type] = {"ppo": PPOConfig, "sft": SFTConfig, "reward": RewardConfig}
_TRAINING = ("per_device_train_batch_size", "lora_r", "lora_dropout")
#: flags that a stage reads, of those that are left open here
_READ = {
    "ppo": (
        *_TRAINING,
        *("num_groups", "reward_model_path", "share_reward_trunk", "reward_funcs"),
        *("critic", "advantage", "distributed"),
        *("rollout_batch_size", "mini_batch_size", "generation_batch_size", "scoring_batch_size"),
        *("response_length", "max_prompt_length", "num_ppo_epochs", "calibration_prompts"),
        *("calibration_samples", "temperature", "entropy_coeff"),
    ),
    "sft": (*_TRAINING, "distributed", "max_length", "gradient_accumulation_steps"),
    "reward": (
        *_TRAINING,
        *("num_groups", "adapters", "generation_batch_size", "scoring_batch_size", "max_length"),
        *("gradient_accumulation_steps", "distributed"),
        *("response_length", "max_prompt_length", "calibration_prompts", "calibration_samples"),
    ),
}


@dataclass
class PlanConfig(CheckedSettings):
    """Memory and time of a stage from the config alone; nothing is loaded, nothing is trained.

    A flag that is left out has the stage's default. One GB is 10^9 bytes.

    Args:
        model_name_or_path: Hugging Face model folder or hub name; its config is all that is read.
        num_groups: groups K of the reward.
        gpus: how many there are; with device cpu, processes of this machine.
        stage: ppo, sft or reward.
        memory_gb: memory of a GPU; with device cpu a process's share of this machine's when left out.
        device: cuda, or cpu for a run on this machine's processor.
        reward_model_path: the reward of ppo, what reward wrote; when left out, what reward makes of the same
            model, with use_peft an adapter a group.
        share_reward_trunk: whether a reward with adapters on the same model is read from the policy's trunk.
        reward_funcs: the rewards of ppo are functions, so that there is no reward model.
        dtype: of the weights below adapters, float32, bfloat16 or auto (what the config says).
        use_peft: train LoRA adapters on a frozen trunk.
        lora_r: rank of the adapters.
        lora_dropout: dropout on the adapters' inputs.
        lora_target_modules: layers that get adapters, or all-linear.
        adapters: of reward, per_group (an adapter a group) or shared.
        critic: adapter (of its own, on the policy's trunk), heads (on the policy's states) or full (a trunk
            of its own, trained as a whole).
        advantage: gae, or rloo and grpo, which have no critic.
        gradient_checkpointing: compute every layer again in the backward pass instead of keeping it.
        distributed: how several GPUs share the work, ddp (each has all weights) or fsdp2 (sharded).
        network_gb_per_s: GB a second between two of them, over the slowest link on the way around: NVLink
            some hundreds, InfiniBand of 400 Gb/s 50, Ethernet of 25 Gb/s 3; when left out 50, with device
            cpu what is measured between processes of this machine.
        network_latency_us: microseconds that a message takes whatever its size; when left out 20, with device
            cpu what is measured.
        rollout_batch_size: responses a rollout, of all GPUs.
        mini_batch_size: responses an optimizer step, of all GPUs.
        per_device_train_batch_size: rows of these in memory at once; pairs for reward.
        generation_batch_size: most responses sampled at once.
        scoring_batch_size: most responses, or texts, read at once without gradients.
        response_length: most tokens of a response.
        max_prompt_length: tokens of the longest prompt.
        max_length: tokens of the longest text of sft and reward.
        num_ppo_epochs: passes over a rollout.
        gradient_accumulation_steps: of sft and reward, batches an optimizer step.
        calibration_prompts: prompts whose samples calibrate the rewards.
        calibration_samples: samples a prompt.
        temperature: of sampling.
        entropy_coeff: weight of an entropy bonus.
        output_dir: folder for summary.json; none is written when left out.
    """

    model_name_or_path: str
    num_groups: int | None = None
    gpus: int = 1
    stage: str = "ppo"
    memory_gb: float | None = None
    device: str = "cuda"
    reward_model_path: str | None = None
    share_reward_trunk: bool | None = None
    reward_funcs: list[str] | None = None
    dtype: str = "float32"
    use_peft: bool = False
    lora_r: int | None = None
    lora_dropout: float | None = None
    lora_target_modules: list[str] | None = None
    adapters: str | None = None
    critic: str | None = None
    advantage: str | None = None
    gradient_checkpointing: bool = False
    distributed: str | None = None
    network_gb_per_s: float | None = None
    network_latency_us: float | None = None
    rollout_batch_size: int | None = None
    mini_batch_size: int | None = None
    per_device_train_batch_size: int | None = None
    generation_batch_size: int | None = None
    scoring_batch_size: int | None = None
    response_length: int | None = None
    max_prompt_length: int | None = None
    max_length: int | None = None
    num_ppo_epochs: int | None = None
    gradient_accumulation_steps: int | None = None
    calibration_prompts: int | None = None
    calibration_samples: int | None = None
    temperature: float | None = None
    entropy_coeff: float | None = None
    output_dir: str | None = None

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together, before any model is made."""
        self.require_known(
            stage=tuple(_STAGES), device=("cuda", "cpu"), dtype=("float32", "bfloat16", "auto")
        )
        read = _READ[self.stage]
        for name in sorted(set().union(*_READ.values()) - set(read)):
            if getattr(self, name) is not None:
                raise UserError(f"--{name} says nothing about --stage {self.stage}: leave it out")
        for name, known in (
            ("critic", ("adapter", "heads", "full")),
            ("advantage", ("gae", "rloo", "grpo")),
            ("distributed", ("none", "ddp", "fsdp2")),
            ("adapters", ADAPTERS),
        ):
            if getattr(self, name) is not None:
                self.require_known(**{name: known})
        self.require_at_least(
            1,
            "gpus", "num_groups", "lora_r", "rollout_batch_size", "mini_batch_size", "generation_batch_size",
            "scoring_batch_size", "response_length", "max_prompt_length", "max_length", "num_ppo_epochs",
            "gradient_accumulation_steps", "calibration_prompts", "calibration_samples",
        )  # fmt: skip
        self.require_at_least(0 if self.stage == "ppo" else 1, "per_device_train_batch_size")
        self.require_positive("memory_gb", "temperature", "network_gb_per_s")
        self.require_at_least(0, "entropy_coeff", "network_latency_us")
        if self.lora_dropout is not None:
            self.require_in_range(0, 1, "lora_dropout")
        if self.stage != "sft" and self.num_groups is None:
            raise UserError(f"--stage {self.stage} needs --num_groups, the groups of the reward")
        if self.gpus > 1 and self.distributed == "none":
            raise UserError(f"--gpus {self.gpus} goes with --distributed ddp or fsdp2; give --gpus 1")
        if self.gpus == 1 and (self.network_gb_per_s or self.network_latency_us):
            raise UserError("--network_gb_per_s and --network_latency_us go with --gpus 2 or more")
        if self.reward_model_path and self.reward_funcs:
            raise UserError("the reward is either --reward_model_path or --reward_funcs; leave one out")
        self._check_adapters()

    def _check_adapters(self) -> None:
        given = ("lora_r", "lora_dropout", "lora_target_modules", "adapters")
        if not self.use_peft and any(getattr(self, name) is not None for name in given):
            raise UserError(f"{', '.join(f'--{name}' for name in given)} go with --use_peft true")
        if self.critic == "adapter" and not self.use_peft:
            raise UserError("--critic adapter goes with --use_peft true")
        if self.critic and self.advantage in ("rloo", "grpo"):
            raise UserError(f"--advantage {self.advantage} has no critic: leave --critic out")

    def resolved(self) -> PlanConfig:
        """These settings with every flag that was left out filled in."""
        own: dict[str, Any] = {
            "critic": "adapter" if self.use_peft else "full",
            "advantage": "gae",
            "distributed": "none" if self.gpus == 1 else "ddp",
            "memory_gb": 80.0 if self.device == "cuda" else _installed_memory() / GB / self.gpus,
            "network_gb_per_s": 50.0 if self.device == "cuda" else 1.0,
            "network_latency_us": 20.0 if self.device == "cuda" else 200.0,
            "reward_funcs": [],
            "lora_target_modules": None if self.stage == "reward" else ["all-linear"],
        }
        order = [_STAGES[self.stage], *_STAGES.values()]
        for field in dataclasses.fields(self):
            defaults = [
                f.default for stage in order for f in dataclasses.fields(stage) if f.name == field.name
            ]
            if field.name not in own and defaults:
                own[field.name] = defaults[0]
        filled = {name: value for name, value in own.items() if getattr(self, name) is None}
        return replace(self, **filled)

    def link(self) -> Link:
        """What lies between two GPUs; of settings with no flag left open."""
        return Link((self.network_gb_per_s or 0.0) * GB, (self.network_latency_us or 0.0) / 1e6)

    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights below adapters."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return getattr(load_config(self.model_name_or_path), "dtype", None) or torch.float32


def _installed_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
