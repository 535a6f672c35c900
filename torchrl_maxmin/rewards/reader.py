"""How one vector is read from a text: its tokens, its padding, where the trunk's states are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.modules.loading import (
    import_transformers,
    is_encoder,
    load_tokenizer,
    reading,
    require_trunk,
)
from torchrl_maxmin.modules.sequences import (
    backbone_of,
    hidden_states,
    keep_last,
    last_index,
    pack_left,
    segment_ids,
    takes,
)
from torchrl_maxmin.modules.trunks import max_positions
from torchrl_maxmin.preferences.texts import set_chat_template
from torchrl_maxmin.rewards.layouts import Text, TextLayout, takes_pairs

__all__ = ["POOLINGS", "TextReader", "load_reader"]

POOLINGS = ("last", "mean", "cls")


class TextReader:
    """Reads texts with a Hugging Face trunk, the same whatever the batch, its padding or its side.

    Decoders get position ids that count real tokens. Encoders, and decoders that take no
    position ids, get their rows packed to the left, the one layout that every architecture
    agrees on; segment ids are told from the separator.

    Args:
        model: the trunk, or a model around it.
        tokenizer: its tokenizer.
        pooling: ``last`` real token (decoders' default), ``mean`` over real tokens (encoders'
            default) or ``cls``, the first token of an encoder.
        layout: see :class:`~torchrl_maxmin.rewards.layouts.TextLayout`; ``continuation`` for
            decoders and ``text_pair`` for encoders when None.

    Raises:
        UserError: for an unknown pooling, or one that the trunk has not.
    """

    def __init__(self, model: Any, tokenizer: Any, *, pooling: str | None = None, layout: str | None = None):
        backbone = backbone_of(model)
        self.tokenizer = tokenizer
        self.bidirectional = is_encoder(model.config)
        self.pooling = pooling or ("mean" if self.bidirectional else "last")
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}")
        if self.pooling == "cls" and not self.bidirectional:
            raise UserError(
                "pooling 'cls' needs an encoder: the first token of a decoder sees nothing but itself"
            )
        pad = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # masks come from lengths: any id will do
        self.pad_id: int = next(token for token in pad if token is not None)
        limits = [max_positions(backbone), tokenizer.model_max_length if self.bidirectional else None]
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        own = "continuation"
        if self.bidirectional:
            own = "text_pair" if takes_pairs(tokenizer) else "{prompt} {completion}"
        self.layout = TextLayout(
            tokenizer, layout or own, bidirectional=self.bidirectional, max_length=self.max_length
        )
        self._packs = self.bidirectional or not takes(backbone, "position_ids")
        segments = (
            self.bidirectional
            and "token_type_ids" in tokenizer.model_input_names
            and (getattr(model.config, "type_vocab_size", None) or 0) > 1
            and takes_pairs(tokenizer)
        )
        self._separator: int | None = tokenizer.sep_token_id if segments else None

    def encode(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        max_length: int | None = None,
        ended: Sequence[bool] | None = None,
    ) -> list[list[int]]:
        """Return token rows of texts; a completion that has not ``ended`` gets no end."""
        return self.layout(prompts, completions, max_length, ended)

    def packed(self, tokens: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name for a Hugging Face model, padded on the right, and their mask [N, T]."""
        tokens, mask = pack_left(tokens, mask, self.pad_id)
        inputs = {"input_ids": tokens, "attention_mask": mask.long()}
        if self._separator is not None:
            inputs["token_type_ids"] = segment_ids(tokens, mask, self._separator)
        return inputs, mask

    def states(self, backbone: nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [N, T, H] of padded tokens, and the mask [N, T] that belongs to them."""
        if self.max_length is not None and tokens.shape[-1] > self.max_length:
            mask = keep_last(mask, self.max_length)
        if not self._packs:
            return hidden_states(backbone, tokens, mask), mask
        inputs, mask = self.packed(tokens, mask)
        return backbone(**inputs).last_hidden_state, mask

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """One vector a text, [N, H]."""
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "mean":
            real = mask[..., None].to(states.dtype)
            return (states * real).sum(1) / real.sum(1)
        return states[torch.arange(len(states), device=states.device), last_index(mask)]


def load_reader(
    name_or_path: str,
    pooling: str | None = None,
    layout: str | None = None,
    chat_template: str | None = None,
    system_prompt: str | None = None,
) -> TextReader:
    """Load what turns texts into a model's tokens, without its weights.

    Args:
        name_or_path: Hugging Face model.
        pooling: see :class:`TextReader`.
        layout: likewise.
        chat_template: see :func:`~torchrl_maxmin.preferences.texts.set_chat_template`.
        system_prompt: likewise.

    Raises:
        UserError: if there is no such model, or it cannot read texts so.
    """
    config = require_trunk(name_or_path)
    tokenizer = set_chat_template(load_tokenizer(name_or_path), chat_template, system_prompt)
    with reading("config", name_or_path), torch.device("meta"):
        trunk = import_transformers().AutoModel.from_config(config)
    return TextReader(trunk, tokenizer, pooling=pooling, layout=layout)
