"""Settings of how a language model is loaded, trained and sampled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from torchrl_maxmin.core.distributed import MODES
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.settings import CheckedSettings
from torchrl_maxmin.models.loading import import_transformers
from torchrl_maxmin.models.lora import LoraSettings, import_peft

__all__ = ["DTYPES", "ModelSettings", "SamplingSettings", "check_stop_strings"]

DTYPES = ("float32", "bfloat16", "auto")


@dataclass(kw_only=True)
class ModelSettings(CheckedSettings):
    """How a language model is loaded and trained.

    Args:
        dtype: of the weights that are loaded; float32, bfloat16, or auto (that of the file). Adapters, heads,
            log-probabilities, statistics and optimizer states are float32 in any case.
        bf16: compute in bfloat16 where the weights stay float32 (autocast).
        tf32: let an NVIDIA GPU multiply float32 matrices in TF32.
        attn_implementation: eager, sdpa, flash_attention_2 or another that transformers knows for the model;
            its own choice when left out.
        load_in_4bit: load the frozen weights in 4 bits, which needs bitsandbytes and goes with use_peft.
        gradient_checkpointing: compute layers again at backward in place of keeping their activations.
        optim: optimizer by its name in transformers, such as adamw_torch, adamw_bnb_8bit or paged_adamw_8bit.
        use_peft: freeze the model and train LoRA adapters on it.
        lora_r: rank of the adapters.
        lora_alpha: scale of the adapters; updates are multiplied by lora_alpha / lora_r.
        lora_dropout: dropout on the adapters' inputs where gradients are taken. 0, where TRL has 0.05: with
            dropout PPO's ratio is not 1 at the first step, and every adapter keeps a copy of its input.
        lora_target_modules: layers that get adapters; all-linear is all but the output embeddings.
        distributed: none, or what each of the processes holds that torchrun starts (torchrun --nproc_per_node
            N -m torchrl_maxmin VERB ...); ddp, a copy of all networks, or fsdp2, a part of them (but all
            adapters). Whatever is of all rows (the groups' utilities, whitening, likelihoods of users) is
            taken of all processes'.
    """

    dtype: str = "float32"
    bf16: bool = False
    tf32: bool = False
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    optim: str = "adamw_torch"
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    distributed: str = "none"

    def check_model(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together, or need what is not installed."""
        self.require_known(dtype=DTYPES, distributed=MODES)
        self.require_at_least(1, "lora_r", "lora_alpha")
        self.require_in_range(0, 1, "lora_dropout")
        if self.bf16 and self.dtype == "bfloat16":
            raise UserError("--bf16 is for float32 weights; with --dtype bfloat16 leave it out")
        lora = [f for f in fields(ModelSettings) if f.name.startswith("lora_")]
        if self.use_peft:
            import_peft()
        elif any(getattr(self, f.name) != getattr(_DEFAULTS, f.name) for f in lora):
            raise UserError(
                f"{', '.join(f'--{f.name}' for f in lora)} are of adapters: they go with --use_peft"
            )
        if self.load_in_4bit and not self.use_peft:
            raise UserError("--load_in_4bit freezes the weights: it goes with --use_peft")
        if self.load_in_4bit and not import_transformers().utils.is_bitsandbytes_available():
            raise UserError(
                "--load_in_4bit needs bitsandbytes, and not an old one: pip install -U bitsandbytes"
            )
        if self.load_in_4bit and getattr(self, "merge_adapter", False):
            raise UserError("4-bit weights take no adapter: --load_in_4bit goes with --merge_adapter false")
        if self.load_in_4bit and self.distributed == "fsdp2":
            raise UserError(
                "--distributed fsdp2 deals weights of 16 or 32 bits; with --load_in_4bit give "
                "--distributed ddp, or leave it out"
            )
        names = [name.value for name in import_transformers().training_args.OptimizerNames]
        if self.optim not in names:
            raise UserError(f"--optim {self.optim!r} is none of {', '.join(names)}")

    def load_options(self) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_maxmin.models.loading.load_causal_lm`."""
        if self.tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        options: dict[str, Any] = {
            "dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        }
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.load_in_4bit:
            options["quantization_config"] = import_transformers().BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        return options

    def lora_settings(self) -> LoraSettings:
        """Size and place of the adapters."""
        return LoraSettings(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


_DEFAULTS = ModelSettings()


@dataclass(kw_only=True)
class SamplingSettings(CheckedSettings):
    """How responses are sampled.

    Args:
        generation_batch_size: most responses sampled at once, to prompts of like length.
        scoring_batch_size: most responses that reference, critic and rewards read at once.
        temperature: of sampling and scoring.
        top_k: sample from so many likeliest tokens; 0 takes all.
        top_p: sample from the likeliest tokens that hold so much probability together; 1 takes all. With it
            or top_k, the KL is that of the truncated distribution, which is sampled, to the whole reference,
            above 0 even for the reference itself, and there is no certificate.
        stop_strings: strings that end a response, beside the end tokens. The response keeps the one that
            ended it, to the end of its last token.
    """

    generation_batch_size: int = 512
    scoring_batch_size: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: list[str] = field(default_factory=list)

    @property
    def truncated(self) -> bool:
        """Whether less likely tokens are left out of what is sampled."""
        return self.top_k > 0 or self.top_p < 1

    def check_sampling(self) -> None:
        """Raise :class:`UserError` for settings that cannot be."""
        self.require_at_least(1, "generation_batch_size", "scoring_batch_size")
        self.require_at_least(0, "top_k")
        self.require_positive("temperature", "top_p")
        self.require_in_range(0, 1, "top_p")
        check_stop_strings(self.stop_strings)

    def sampling_options(self) -> dict[str, Any]:
        """Arguments of :meth:`~torchrl_maxmin.models.language.TokenPolicy.from_pretrained`."""
        names = ("generation_batch_size", "temperature", "top_k", "top_p", "stop_strings")
        return {name: getattr(self, name) for name in names}


def check_stop_strings(strings: Sequence[str]) -> None:
    """Raise :class:`UserError` for a stop string that every response has."""
    if not all(strings):
        raise UserError(
            "--stop_strings holds an empty string, which every response begins with: leave it out"
        )
