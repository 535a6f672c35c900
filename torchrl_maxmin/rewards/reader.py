"""Reading of texts by a model: prompt and completion as tokens of one text, and where states are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import (
    import_transformers,
    is_encoder,
    load_tokenizer,
    reading,
    require_trunk,
)
from torchrl_maxmin.models.sequences import (
    backbone_of,
    hidden_states,
    keep_last,
    last_index,
    max_positions,
    pack_left,
    segment_ids,
    takes,
)
from torchrl_maxmin.preferences.chat import (
    Text,
    as_transcript,
    is_conversational,
    set_chat_template,
    split_prompt,
)
from torchrl_maxmin.preferences.texts import TextEncoder, cut_start, with_one_bos

__all__ = ["LAYOUTS", "POOLINGS", "SCORED_AT_ONCE", "TextLayout", "TextReader", "load_reader", "takes_pairs"]

LAYOUTS = ("auto", "continuation", "chat", "concat", "text_pair", "response")
POOLINGS = ("last", "mean", "cls")
#: Texts that a model without gradients reads at once, where nothing else is asked for.
SCORED_AT_ONCE = 256


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
        layout: see :class:`~torchrl_maxmin.rewards.reader.TextLayout`; ``continuation`` for
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

    def facts(self) -> dict[str, Any]:
        """How a row of tokens is read, beside the weights."""
        segments = {"packed": self._packs, "separator": self._separator}
        return {"pooling": self.pooling, "positions": self.max_length, **segments}

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
        chat_template: see :func:`~torchrl_maxmin.preferences.chat.set_chat_template`.
        system_prompt: likewise.

    Raises:
        UserError: if there is no such model, or it cannot read texts so.
    """
    config = require_trunk(name_or_path)
    tokenizer = set_chat_template(load_tokenizer(name_or_path), chat_template, system_prompt)
    with reading("config", name_or_path), torch.device("meta"):
        trunk = import_transformers().AutoModel.from_config(config)
    return TextReader(trunk, tokenizer, pooling=pooling, layout=layout)


# -- one text's tokens -----------------------------------------------------------------------------


class TextLayout:
    """Encodes prompts and completions as token rows.

    ``continuation``
        decoders: prompt and completion tokenized apart, as when a policy answers the prompt, and EOS;
        the rows of :class:`~torchrl_maxmin.preferences.texts.TextEncoder`, conversations included.
    ``chat``
        the whole conversation through the tokenizer's chat template; plain texts become one
        turn of the user and one of the assistant.
    ``concat``
        ``prompt + completion`` tokenized as one text (decoders: and EOS), as TRL's reward trainer does.
    ``text_pair``
        what the tokenizer makes of two texts (``[CLS] prompt [SEP] completion [SEP]``); an empty
        prompt leaves one text.
    ``response``
        the completion alone (decoders: and EOS).
    a template
        any string with ``{completion}`` and, if wanted, ``{prompt}`` in it, tokenized like ``concat``.
    ``auto``
        ``chat`` for conversations where there is a chat template; else ``text_pair`` for
        encoders that know pairs, and ``concat``.

    Where no chat template is used, a conversation becomes the transcript that preference data
    become. A completion that was cut off gets no end. Texts that are too long lose tokens of their
    start (but for BOS) under a decoder, whose score is read at the end, and what the tokenizer
    truncates under an encoder.

    Args:
        tokenizer: of the reward model.
        kind: one of the above.
        bidirectional: whether the model is an encoder.
        max_length: tokens that the model has positions for, or None.

    Raises:
        UserError: for an unknown layout, or one that the tokenizer cannot do.

    Example:
        >>> from torchrl_maxmin.world import build_tokenizer
        >>> layout = TextLayout(build_tokenizer(), "response", bidirectional=False)
        >>> [len(row) for row in layout(["the film", "we"], ["was great .", "liked it"])]
        [5, 4]
    """

    def __init__(
        self, tokenizer: Any, kind: str = "auto", *, bidirectional: bool, max_length: int | None = None
    ):
        if kind not in LAYOUTS and "{completion}" not in kind:
            raise UserError(
                f"layout {kind!r} is none of {', '.join(LAYOUTS)}, and no template with {{completion}} in it"
            )
        if kind == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError("layout 'chat' needs a tokenizer with a chat template; this one has none")
        if kind == "continuation" and bidirectional:
            raise UserError("layout 'continuation' is a decoder's; give an encoder 'text_pair' or 'concat'")
        self._takes_pairs = takes_pairs(tokenizer)
        if kind == "text_pair" and bidirectional and not self._takes_pairs:
            raise UserError("layout 'text_pair' needs a tokenizer that separates two texts; use 'concat'")
        self.tokenizer, self.kind = tokenizer, kind
        self._encoder = TextEncoder(tokenizer)
        self.bidirectional, self.max_length = bidirectional, max_length

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        max_length: int | None = None,
        ended: Sequence[bool] | None = None,
    ) -> list[list[int]]:
        """Return token rows of texts, each of at most ``max_length`` tokens and of those the model can take.

        ``ended`` says which completions have an end; all have when None.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts, but {len(completions)} completions")
        if not prompts:
            return []
        limit = min((most for most in (max_length, self.max_length) if most is not None), default=None)
        if self.kind == "continuation":
            return self._encoder(prompts, completions, limit, ended)
        ended = [True] * len(prompts) if ended is None else ended
        texts = list(zip(prompts, completions, ended, strict=True))
        rows: list[list[int]] = [[] for _ in texts]
        for chat in (False, True):
            places = [i for i, text in enumerate(texts) if self._is_chat(*text[:2]) == chat]
            if places:
                part = self._of_kind(chat, [texts[i] for i in places], limit)
                for i, row in zip(places, part, strict=True):
                    rows[i] = row
        bos = None if self.bidirectional else self.tokenizer.bos_token_id
        return [cut_start(row, limit, bos) for row in rows]

    def _is_chat(self, prompt: Text, completion: Text) -> bool:
        if self.kind != "auto" or not self._encoder.has_template:
            return self.kind == "chat"
        return is_conversational(prompt) or is_conversational(completion)

    def _of_kind(
        self, chat: bool, texts: Sequence[tuple[Text, Text, bool]], limit: int | None
    ) -> list[list[int]]:
        prompts, completions, ended = map(list, zip(*texts, strict=True))
        if chat:
            whole = self._encoder.conversations(prompts, completions, ended)
            return self._ids(whole, limit=limit, special=False)  # the template has its own special tokens
        plain = [_plain_texts(p, c, i) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        kind = self.kind
        if kind == "auto" and self.bidirectional:
            kind = "text_pair" if self._takes_pairs else "{prompt} {completion}"
        if kind == "text_pair":
            return self._pairs(plain, limit)
        joined = "{prompt}{completion}"
        template = {"auto": joined, "concat": joined, "response": "{completion}"}.get(kind, kind)
        rows = self._ids([template.format(prompt=p, completion=c) for p, c in plain], limit=limit)
        if self.bidirectional:
            return rows
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        bare = [row[:-1] if eos and row[-1:] == eos else row for row in rows]  # some tokenizers append it
        return [[*row, *eos] if has_end else row for row, has_end in zip(bare, ended, strict=True)]

    def _pairs(self, texts: list[tuple[str, str]], limit: int | None) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in texts]
        for alone in (False, True):  # an empty prompt leaves one text
            part = [i for i, (prompt, _) in enumerate(texts) if bool(prompt) != alone]
            if part:
                sides = list(map(list, zip(*(texts[i] for i in part), strict=True)))[alone:]
                for i, row in zip(part, self._ids(*sides, limit=limit), strict=True):
                    rows[i] = row
        return rows

    def _ids(self, *texts: list[str], limit: int | None = None, special: bool = True) -> list[list[int]]:
        # the tokenizer would cut the end, where a decoder's score is read
        truncation = {"truncation": True, "max_length": limit} if self.bidirectional and limit else {}
        rows = self.tokenizer(*texts, add_special_tokens=special, **truncation).input_ids
        return [with_one_bos(row, self.tokenizer) for row in rows]


def takes_pairs(tokenizer: Any) -> bool:
    """Whether a tokenizer separates two texts, with segment ids that the separator alone tells."""
    count = tokenizer.num_special_tokens_to_add
    if count(pair=True) <= count(pair=False):
        return False
    segments = tokenizer("a", "b").get("token_type_ids")
    if not segments or not any(segments):
        return True
    ids = tokenizer("a", "b").input_ids
    first = ids.index(tokenizer.sep_token_id) + 1 if tokenizer.sep_token_id in ids else 0
    return segments == [0] * first + [1] * (len(ids) - first)


def _plain_texts(prompt: Text, completion: Text, row: int) -> tuple[str, str]:
    """Prompt and completion as strings; conversations as the transcripts that preference data become."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    start, (end,) = as_transcript(*split_prompt(prompt, [completion], row, ["completion"]))
    return start, end
