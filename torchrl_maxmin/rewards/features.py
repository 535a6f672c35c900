"""Frozen features of texts, on which linear rewards are fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.modules.loading import (
    ensure_pad_token,
    import_transformers,
    is_encoder,
    load_causal_lm,
    load_tokenizer,
    load_trunk,
    require_model,
)
from torchrl_maxmin.modules.sequences import backbone_of, hidden_states, last_index, pad_right
from torchrl_maxmin.modules.trunks import states_width
from torchrl_maxmin.preferences.texts import set_chat_template
from torchrl_maxmin.rewards.reader import TextReader

__all__ = ["load_feature_trunk", "text_features"]


def load_feature_trunk(
    name_or_path: str,
    pooling: str | None = None,
    layout: str | None = None,
    chat_template: str | None = None,
    system_prompt: str | None = None,
) -> tuple[Any, TextReader]:
    """Load a language model, decoder or encoder, to take features from, and what reads texts with it.

    Args:
        name_or_path: Hugging Face model.
        pooling: see :class:`~torchrl_maxmin.rewards.reader.TextReader`.
        layout: likewise.
        chat_template: see :func:`~torchrl_maxmin.preferences.texts.set_chat_template`.
        system_prompt: likewise.

    Raises:
        UserError: if there is no such model, or it cannot be read.
    """
    require_model(name_or_path)
    if is_encoder(import_transformers().AutoConfig.from_pretrained(name_or_path)):
        model, tokenizer = load_trunk(name_or_path)
    else:
        tokenizer, model = load_tokenizer(name_or_path), load_causal_lm(name_or_path)
        ensure_pad_token(tokenizer, model)
    set_chat_template(tokenizer, chat_template, system_prompt)
    return model, TextReader(model, tokenizer, pooling=pooling, layout=layout)


@torch.no_grad()
def text_features(
    model: Any,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int = 256,
    *,
    reader: TextReader | None = None,
) -> Tensor:
    """Frozen features [N, 2H + E] of token rows: pooled state, and sums of hidden states and embeddings.

    The sums let a linear head see counts, above all length. H is the width of the trunk's states, E
    that of its embeddings; for most models they are equal.

    Args:
        model: a language model or its trunk.
        rows: token ids of N texts.
        pad_id: what pads a batch.
        batch_size: rows at once.
        reader: how the trunk is read; a decoder at the last token when None.
    """
    backbone, embed = backbone_of(model), model.get_input_embeddings()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    features = torch.empty(len(rows), 2 * states_width(backbone) + embed.weight.shape[-1])
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tokens, mask = (t.to(device) for t in pad_right([rows[i] for i in part], pad_id))
        if reader is None:
            states, here = hidden_states(backbone, tokens, mask), mask
            pooled = states[torch.arange(len(part), device=device), last_index(mask)]
        else:
            states, here = reader.states(backbone, tokens, mask)
            pooled = reader.pool(states, here)
        sums = [
            (x * real[..., None].to(x.dtype)).sum(1) for x, real in ((states, here), (embed(tokens), mask))
        ]
        features[part] = torch.cat([pooled, *sums], -1).float().cpu()
    return features
