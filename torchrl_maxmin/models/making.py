"""Which kind of networks a run has, by its settings."""

from __future__ import annotations

from typing import Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.full import FullCopies, LanguageNetworks
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.settings import ModelSettings
from torchrl_maxmin.models.shared import SharedTrunk

__all__ = ["CRITICS", "check_critic", "make_networks", "make_sampler"]

#: what may give the values
CRITICS = ("adapter", "heads", "full")


def check_critic(settings: ModelSettings, critic: str | None) -> None:
    """Raise :class:`UserError` for an unknown critic, or one that needs adapters where there are none."""
    if critic not in (None, *CRITICS):
        raise UserError(f"--critic {critic!r} is none of {', '.join(CRITICS)}")
    if critic == "adapter" and not settings.use_peft:
        raise UserError("--critic adapter is an adapter on the policy's trunk: it needs --use_peft")
    if critic == "full" and settings.load_in_4bit:
        raise UserError(
            "--critic full trains a copy of the trunk, which 4-bit weights cannot be: with --load_in_4bit "
            "give --critic adapter or heads"
        )


def make_networks(
    settings: ModelSettings,
    reference: TokenPolicy,
    tokenizer: Any,
    num_columns: int,
    *,
    critic: str | None = None,
    merge_adapter: bool = True,
    **options: Any,
) -> LanguageNetworks:
    """Make policy and critic from a reference policy.

    Args:
        settings: whether they are adapters, and how they are trained.
        reference: loaded so.
        tokenizer: theirs.
        num_columns: value heads of the critic.
        critic: ``adapter``, ``heads`` or ``full``; when None an adapter with adapters, else full.
        merge_adapter: whether a saved policy is a plain model.
        **options: those of :class:`~torchrl_maxmin.models.full.LanguageNetworks`.
    """
    options |= {"gradient_checkpointing": settings.gradient_checkpointing, "autocast": settings.bf16}
    options |= {"sharded": settings.distributed == "fsdp2"}
    if settings.use_peft:
        lora = settings.lora_settings()
        options |= {"lora": lora, "merge": merge_adapter, "critic": critic or "adapter"}
        return SharedTrunk(reference, tokenizer, num_columns, **options)
    return FullCopies(reference, tokenizer, num_columns, critic=critic or "full", **options)


def make_sampler(settings: ModelSettings, policy: TokenPolicy, tokenizer: Any) -> LanguageNetworks:
    """Make the networks of a process that samples alone: one trunk, and no critic.

    Args:
        settings: those that the trainer's networks were made by.
        policy: loaded as the trainer's reference.
        tokenizer: theirs.
    """
    if settings.use_peft:
        return SharedTrunk(policy, tokenizer, 0, lora=settings.lora_settings(), autocast=settings.bf16)
    return LanguageNetworks(policy, policy, None, tokenizer, autocast=settings.bf16)
