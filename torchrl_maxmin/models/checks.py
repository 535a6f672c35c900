"""Whether what a policy samples is what it is trained on, tried on the model itself before any work."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.core.errors import UnservedModelError, UserError
from torchrl_maxmin.models.sequences import (
    answering,
    max_positions,
    pad_left,
    position_ids,
    takes,
    undisturbed,
)

__all__ = ["check_first_rollout", "check_model", "deviation", "rounding_bound"]

_LENGTHS = (1, 3, 6)  # of the prompts that are tried
_RESPONSE = 5


def rounding_bound(dtype: torch.dtype, largest: float) -> float:
    """How far two ways to the same log-probabilities may be apart, as :func:`deviation` measures it.

    The rounding of a logit is a multiple of eps times its size: some hundred in float32, where sums of
    as many products are taken in another order; in half precision every layer rounds anew. Nothing is
    finer than float32, in which ``generate`` samples.

    Args:
        dtype: of the model's weights.
        largest: the largest logit in absolute value.
    """
    factor = 16 if dtype.itemsize == 2 else 256
    return factor * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * max(1.0, largest)


def deviation(found: Tensor, expected: Tensor, mask: Tensor, dtype: torch.dtype) -> float:
    """Distance of log-probabilities [B, R] where the mask holds: the largest, in half precision the mean."""
    apart = (found.double() - expected.double())[mask].abs()
    return float(apart.mean() if dtype.itemsize == 2 else apart.max())


def check_model(policy: Any) -> None:
    """Try a policy (:class:`~torchrl_maxmin.models.language.TokenPolicy`) on a few padded prompts.

    The log-probabilities that train it (the chunked operator on its trunk's hidden states) must be
    those of the model's own logits, the same whether a row is padded or not, and those that
    ``generate`` samples with, up to the rounding of the model's dtype.

    Raises:
        UserError: for a model where they are not, with the likely cause.
    """
    model, name = policy.model, type(policy.model).__name__
    batch = _trial_batch(policy)
    tokens = torch.cat([batch["prompt_tokens"], batch["action"]], -1)
    mask = torch.cat([batch["prompt_mask"], batch["action_mask"]], -1)
    with undisturbed(model), answering(name):
        logits = _logits(model, tokens, mask)
        largest = float(logits[mask].abs().max())
        if not largest < float("inf"):  # NaN included
            raise UserError(
                f"{name} gives logits that are NaN or infinite: its weights are damaged, or overflow in "
                f"{_dtype_name(policy)}; save or download them again"
            )
        before = logits[:, batch["prompt_tokens"].shape[-1] - 1 : -1]
        trained = policy.log_prob(batch)
        _require_equal(
            policy,
            trained,
            _chosen(before, batch["action"], policy.temperature),
            batch["action_mask"],
            largest,
            "the log-probabilities that train it are not those of its own logits",
            "something other than a scale, a soft cap or a bias happens between hidden states and logits",
        )
        alone = torch.cat([_unpadded(policy, row) for row in batch.split(1)])
        _require_equal(
            policy,
            trained,
            alone,
            batch["action_mask"],
            largest,
            "a padded prompt gets other log-probabilities than the same prompt alone",
            "it does not respect the mask of left padding, or counts positions from the padding on",
        )
        prompts = batch.select("prompt_tokens", "prompt_mask")
        sampled = policy(prompts.clone(), batch["action"].shape[-1])
        _require_equal(
            policy,
            policy.log_prob(sampled),
            sampled.get("whole_log_prob", sampled["sample_log_prob"]),
            sampled["action_mask"],
            largest,
            "generate() samples with other log-probabilities than those that train it",
            "its cache or its positions differ between a step of generation and a whole sequence",
        )


@torch.no_grad()
def check_first_rollout(policy: Any, rollout: TensorDictBase, rows: int = 64) -> Tensor:
    """Check the two first statements of PPO before any update: its ratio is 1, and its KL is 0.

    Args:
        policy: as it has sampled, and equal to the reference.
        rollout: with what :meth:`TokenPolicy.forward` reads and writes, and ``ref_log_prob`` [B, R].
        rows: how many of them are looked at.

    Returns:
        The log-probabilities [rows, R] that the policy is trained with.

    Raises:
        UserError: where they do not hold up to the rounding of the model's dtype, with the likely cause.
    """
    rollout = rollout[:rows]
    mask = rollout["action_mask"]
    prompt_mask = rollout["prompt_mask"]
    few = slice(0, 2)  # all logits of more would be larger than the models
    logits = _logits(policy.model, rollout["prompt_tokens"][few], prompt_mask[few])
    largest = float(logits[prompt_mask[few]].abs().max())
    scored = policy.log_prob(rollout)
    _require_equal(
        policy,
        scored,
        rollout.get("whole_log_prob", rollout["sample_log_prob"]),
        mask,
        largest,
        "before the first update the probability ratio of PPO is not 1",
        "the rollout samples from another distribution than the one that is scored: another temperature, "
        "other weights, or a cache or positions that differ",
    )
    _require_equal(
        policy,
        scored,
        rollout["ref_log_prob"],
        mask,
        largest,
        "before the first update the KL to the reference is not 0",
        "policy and reference were not loaded from the same weights, or one has been changed",
    )
    return scored


def _trial_batch(policy: Any) -> TensorDict:
    """Ragged prompts and responses of ordinary tokens, within the model's positions."""
    head = policy.model.get_output_embeddings()
    positions = max_positions(policy.model) or max(_LENGTHS) + _RESPONSE
    response = max(1, min(_RESPONSE, positions // 2, policy.max_new_tokens))
    lengths = [max(1, min(length, positions - response)) for length in _LENGTHS]
    special = {policy.pad_token_id, *policy.eos_token_ids}
    vocabulary = min(policy.model.get_input_embeddings().num_embeddings, head.weight.shape[0])
    ordinary = [token for token in range(min(vocabulary, 10_000)) if token not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(ordinary), (sum(lengths) + len(lengths) * response,), generator=generator)
    stream = iter(ordinary[i] for i in draws.tolist())
    prompts = [[next(stream) for _ in range(length)] for length in lengths]
    tokens, mask = pad_left(prompts, policy.pad_token_id)
    action = torch.tensor([[next(stream) for _ in range(response)] for _ in lengths])
    rows = {
        "prompt_tokens": tokens,
        "prompt_mask": mask,
        "action": action,
        "action_mask": torch.ones_like(action, dtype=torch.bool),
    }
    return TensorDict(rows, [len(lengths)]).to(head.weight.device)


def _logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """The model's own logits [B, T, V], asked as ``generate`` asks."""
    inputs = {"input_ids": tokens, "attention_mask": mask.long()}
    if takes(model, "position_ids"):
        inputs["position_ids"] = position_ids(mask)
    return model(**inputs).logits


def _chosen(logits: Tensor, action: Tensor, temperature: float) -> Tensor:
    log_probs = (logits.double() / temperature).log_softmax(-1)
    return log_probs.gather(-1, action[..., None]).squeeze(-1)


def _unpadded(policy: Any, row: TensorDict) -> Tensor:
    real = row["prompt_mask"][0]
    row = row.copy()
    row["prompt_tokens"], row["prompt_mask"] = row["prompt_tokens"][:, real], row["prompt_mask"][:, real]
    return policy.log_prob(row)


def _dtype_name(policy: Any) -> str:
    return str(policy.dtype).removeprefix("torch.")


def _require_equal(
    policy: Any,
    found: Tensor,
    expected: Tensor,
    mask: Tensor,
    largest: float,
    fault: str,
    cause: str,
) -> None:
    dtype = policy.dtype
    apart = deviation(found, expected, mask, dtype)
    bound = rounding_bound(dtype, largest / policy.temperature)
    if not apart <= bound:
        raise UnservedModelError(
            f"{type(policy.model).__name__} cannot be trained as a policy: {fault} (by {apart:.2g}; "
            f"{_dtype_name(policy)} allows {bound:.1g}); likely cause: {cause}"
        )
