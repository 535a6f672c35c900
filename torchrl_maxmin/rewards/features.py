"""Frozen features of texts, on which linear rewards are fitted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrl_maxmin.modules.sequences import backbone_of, hidden_states, last_index, pad_right

__all__ = ["text_features"]


@torch.no_grad()
def text_features(model: nn.Module, rows: list[list[int]], pad_id: int, batch_size: int = 256) -> Tensor:
    """Frozen features [N, 3H] of token rows: last hidden state, and sums of hidden states and embeddings.

    The sums let a linear head see counts, above all length.
    """
    backbone, embed = backbone_of(model), model.get_input_embeddings()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    features = torch.empty(len(rows), 3 * model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tokens, mask = (t.to(device) for t in pad_right([rows[i] for i in part], pad_id))
        states = hidden_states(backbone, tokens, mask)
        last = states[torch.arange(len(part), device=device), last_index(mask)]
        real = mask[..., None].to(states.dtype)
        sums = [(states * real).sum(1), (embed(tokens) * real).sum(1)]
        features[part] = torch.cat([last, *sums], -1).float().cpu()
    return features
