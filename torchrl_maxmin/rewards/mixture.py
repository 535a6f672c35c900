"""K reward heads on one trunk: one pass scores a text for every group."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from maxmin_kernels import reward_heads_min
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import is_main_process
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.json_text import write_json_text
from torchrl_maxmin.models.checkpointing import checkpoint_layers
from torchrl_maxmin.models.loading import (
    ensure_pad_token,
    is_encoder,
    load_classifier,
    load_config,
    load_tokenizer,
    load_trunk,
    load_whole,
    reading,
    same_vocabulary,
)
from torchrl_maxmin.models.lora import (
    AdapterSwitch,
    LoraSettings,
    add_adapters,
    copy_adapter_,
)
from torchrl_maxmin.models.sequences import backbone_of, states_width
from torchrl_maxmin.models.sharding import gathered_state
from torchrl_maxmin.preferences.chat import set_chat_template
from torchrl_maxmin.rewards import adapters as lora
from torchrl_maxmin.rewards.base import (
    HEADS_FILE,
    RewardHeads,
    RewardModel,
    has_linear_score,
    permute_rows_,
    read_heads,
    require_heads,
    reset_row_,
)
from torchrl_maxmin.rewards.calibration import Calibration
from torchrl_maxmin.rewards.reader import Text, TextReader

__all__ = ["RewardMixture"]


class RewardMixture(RewardModel):
    """Bradley-Terry reward heads of K groups on a shared Hugging Face trunk.

    Linear heads on a decoder are an ordinary ``AutoModelForSequenceClassification`` with
    ``num_labels=K``; its folder loads without this package and gives the same raw scores.
    Every other form is a trunk, read by a :class:`~torchrl_maxmin.rewards.reader.TextReader`, and
    :class:`~torchrl_maxmin.rewards.base.RewardHeads` beside it. What ``transformers`` has no
    place for (mixing weights, calibration, the form) lies in ``mixture.json``.

    Args:
        model: with ``heads`` a trunk, plain or with adapters; without, a decoder's sequence
            classifier whose linear head is named ``score``.
        tokenizer: its tokenizer.
        log_prior: log mixing weights [K]; uniform when None.
        calibration: puts the heads on one scale; identity when None.
        heads: on top of a trunk.
        pooling, layout: see :class:`~torchrl_maxmin.rewards.reader.TextReader`.
        adapters: ``"per_group"`` or ``"shared"`` where ``model`` carries LoRA adapters.
        switch: that of a model which others read too, see :mod:`torchrl_maxmin.rewards.on_trunk`.
        names: what it knows the adapters by; None stands for the model without.

    Attributes:
        num_tokens: rows of the trunk's embeddings that a text may use.

    Example:
        >>> mixture = RewardMixture.from_backbone("gpt2", num_groups=2)  # doctest: +SKIP
        >>> mixture.score(["the film"], ["was great"]).shape  # doctest: +SKIP
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        log_prior: Tensor | None = None,
        calibration: Calibration | None = None,
        *,
        heads: RewardHeads | None = None,
        pooling: str | None = None,
        layout: str | None = None,
        adapters: str | None = None,
        switch: AdapterSwitch | None = None,
        names: Sequence[Any] | None = None,
    ):
        if heads is None and not isinstance(getattr(model, "score", None), nn.Linear):
            raise UserError(
                f"{type(model).__name__} has no linear head named 'score', as a decoder's sequence "
                "classifier has (GPT-2, Llama, Qwen, Mistral, Gemma ...); give a trunk and heads, or load "
                "a classifier of another kind with RewardEnsemble.from_pretrained"
            )
        output = model.score if heads is None else heads.output
        super().__init__(output.out_features, log_prior, calibration)
        self.model, self.heads, self.adapters = model, heads, adapters
        self.autocast, self.dropout = False, False
        self.names: Sequence[Any] = names or (
            lora.adapter_names(adapters, self.num_groups) if adapters else []
        )
        self.switch = AdapterSwitch(model, self.names[0]) if adapters and switch is None else switch
        self.tokenizer = tokenizer
        self.num_tokens: int = model.get_input_embeddings().num_embeddings
        self.reader = TextReader(model, tokenizer, pooling=pooling, layout=layout)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        num_groups: int,
        *,
        head: str = "linear",
        rank: int | None = None,
        pooling: str | None = None,
        layout: str | None = None,
        use_peft: bool = False,
        adapters: str = "per_group",
        lora_r: int = 16,
        lora_alpha: int = 32,
        lora_dropout: float = 0.0,
        lora_target_modules: Sequence[str] | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        autocast: bool = False,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        **load_options: Any,
    ) -> RewardMixture:
        """New heads on the trunk of a language model: a decoder (GPT-2, Llama ...) or an encoder (BERT ...).

        Args:
            name_or_path: folder or hub name of the model.
            num_groups: K.
            head: ``linear``, ``mlp`` or ``low_rank``, see :class:`~torchrl_maxmin.rewards.base.RewardHeads`.
            rank: features of ``low_rank``; K when None.
            pooling: ``last``, ``mean`` or ``cls``, see :class:`~torchrl_maxmin.rewards.reader.TextReader`.
            layout: how prompt and completion become one text, see
                :class:`~torchrl_maxmin.rewards.reader.TextLayout`; None suits the trunk.
            use_peft: freeze the trunk and train LoRA adapters on it.
            adapters: ``per_group``: every group has an adapter and a head of its own, and a text takes K
                passes; ``shared``: one adapter, one pass, K heads.
            lora_r: rank of the adapters.
            lora_alpha: their scale; updates are multiplied by ``lora_alpha / lora_r``.
            lora_dropout: on their inputs, in training mode.
            lora_target_modules: names of the layers, or ``all-linear``; when None peft's choice, and all
                linear layers where it has none.
            dtype: of the trunk; heads and adapters train in fp32.
            autocast: compute the trunk in bfloat16 where its weights are fp32; off in a saved model.
            gradient_checkpointing: compute layers again at backward in place of keeping their activations.
            chat_template: see :func:`~torchrl_maxmin.preferences.chat.set_chat_template`; saved with the
                tokenizer.
            system_prompt: likewise.
            **load_options: further ones of ``from_pretrained`` of ``transformers``.

        Raises:
            UserError: for a model or options that cannot be used.
        """
        config = load_config(name_or_path)
        plain = head == "linear" and rank is None and not use_peft and pooling in (None, "last")
        chat = chat_template, system_prompt
        if plain and not is_encoder(config) and has_linear_score(config):
            mixture = cls._from_classifier(name_or_path, num_groups, dtype, layout, chat, **load_options)
        else:
            trunk, tokenizer = load_trunk(name_or_path, dtype, **load_options)
            set_chat_template(tokenizer, *chat)
            reading_options: dict[str, Any] = {"pooling": pooling, "layout": layout}
            reading_options["heads"] = RewardHeads(head, states_width(trunk), num_groups, rank)
            if use_peft:
                settings = LoraSettings(lora_r, lora_alpha, lora_dropout, lora_target_modules)
                trunk = add_adapters(trunk, lora.adapter_names(adapters, num_groups), settings)
                reading_options["adapters"] = adapters
            mixture = cls(trunk, tokenizer, **reading_options)
        mixture.autocast = autocast
        if gradient_checkpointing:
            checkpoint_layers(mixture.model, mixture.switch.snapshot if mixture.switch else nullcontext)
        return mixture

    @classmethod
    def _from_classifier(
        cls,
        name_or_path: str,
        num_groups: int,
        dtype: torch.dtype | str,
        layout: str | None,
        chat: tuple[Any, Any],
        **load_options: Any,
    ) -> RewardMixture:
        """A decoder's sequence classifier; its head is drawn from N(0, 1 / (hidden + 1))."""
        from transformers import AutoModelForSequenceClassification

        tokenizer = set_chat_template(load_tokenizer(name_or_path), *chat)
        # for those who load the folder without us: absolute positions are right with padding at the end alone
        tokenizer.padding_side = "right"
        options = load_options | {"num_labels": num_groups, "dtype": dtype}
        kind = AutoModelForSequenceClassification
        model = load_whole(kind, name_or_path, fresh=("score.",), foreign_heads=True, **options)
        ensure_pad_token(tokenizer, model)
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
        return cls(model, tokenizer, layout=layout)

    @classmethod
    def from_causal_lm(cls, name_or_path: str, num_groups: int) -> RewardMixture:
        """Linear heads on a trunk: :meth:`from_backbone` with its defaults."""
        return cls.from_backbone(name_or_path, num_groups)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RewardMixture:
        """Load what :meth:`save_pretrained` wrote; a plain classifier folder is taken uncalibrated.

        Raises:
            UserError: for a folder without a model, or without the heads that belong to it.
        """
        extra = Path(folder) / "mixture.json"
        with reading("mixture.json", str(folder)):
            state = json.loads(extra.read_text()) if extra.is_file() else {}
        if "heads" in state:
            parts = cls._load_heads(Path(folder), state["heads"])
        else:
            model = load_classifier(str(folder), getattr(torch, state.get("dtype", "float32")))
            parts = {"model": model, "tokenizer": load_tokenizer(str(folder))}
        if not state:
            return cls(**parts)
        return cls(
            log_prior=torch.tensor(state["prior"]).log(),
            calibration=Calibration.from_dict(state["calibration"]),
            layout=state.get("layout"),
            **parts,
        )

    @staticmethod
    def _load_heads(folder: Path, form: dict[str, Any]) -> dict[str, Any]:
        require_heads(folder)
        base, dtype = form["base"], getattr(torch, form["dtype"])
        model, _ = load_trunk(base or str(folder), dtype, alone=base is None)
        names = [] if form["adapters"] is None else lora.adapter_names(form["adapters"], form["num_groups"])
        heads = read_heads(folder, form, states_width(model))
        return {
            "model": lora.load_adapters(model, folder, names) if names else model,
            "tokenizer": load_tokenizer(str(folder)),
            "heads": heads.requires_grad_(),
            "pooling": form["pooling"],
            "adapters": form["adapters"],
        }

    def save_pretrained(self, folder: str | Path, *, include_base: bool = True) -> None:
        """Write the Hugging Face folder, its tokenizer, the heads and ``mixture.json``.

        Args:
            folder: where to.
            include_base: also write the frozen trunk below LoRA adapters; without, the folder is
                small, and loading it looks for the trunk where it came from.
        """
        base = self.model.get_base_model() if self.adapters else self.model
        folder, gathered = Path(folder), gathered_state(base)
        if not is_main_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "prior": self.log_prior.exp().tolist(),
            "calibration": self.calibration.to_dict(),
            "layout": self.reader.layout.kind,
        }
        dtype = str(self.model.dtype).removeprefix("torch.")
        if self.heads is None:
            self.model.save_pretrained(folder, **gathered)
            state["dtype"] = dtype
        else:
            from safetensors.torch import save_file

            whole = include_base or not self.adapters
            state["heads"] = {
                "kind": self.heads.kind,
                "rank": self.heads.rank,
                "num_groups": self.num_groups,
                "pooling": self.reader.pooling,
                "adapters": self.adapters,
                "base": None if whole else base.name_or_path,
                "dtype": dtype,
            }
            save_file({k: v.contiguous() for k, v in self.heads.state_dict().items()}, folder / HEADS_FILE)
            if self.adapters is None:
                self.model.save_pretrained(folder, **gathered)
            else:
                lora.save_adapters(self.model, folder, self.names)
                if include_base:
                    lora.save_base(self.model, folder, **gathered)
                else:
                    base.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json_text(folder / "mixture.json", state)

    # -- scores -----------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, mask: Tensor, *, calibrated: bool = False) -> Tensor:
        """Score padded texts with every head.

        Args:
            tokens: [N, T] int64, padded on either side. Those that the trunk has no row for are left out:
                policies often have more rows than their tokenizer has words, and sample them.
            mask: [N, T] bool, True at real tokens.
            calibrated: apply :attr:`calibration`.

        Returns:
            Rewards [N, K] in fp32, read at the last real token or what ``pooling`` says.
        """
        known = tokens < self.num_tokens
        tokens, mask = tokens.masked_fill(~known, self.reader.pad_id), mask & known
        if self.switch is None:
            vectors = self._vectors(tokens, mask)
        else:
            each = [self._vectors(tokens, mask, name) for name in self.names]
            vectors = torch.stack(each, 1) if self.adapters == "per_group" else each[0]
        if self.heads is None:
            rewards = reward_heads_min(vectors, self.output.weight, self.output.bias)[0]
        else:
            rewards = self.heads(vectors)
        return self.calibration.apply(rewards) if calibrated else rewards

    def _vectors(self, tokens: Tensor, mask: Tensor, adapter: str | None = None) -> Tensor:
        with ExitStack() as stack:
            if self.switch is not None:
                stack.enter_context(self.switch.using(adapter, self.dropout))
            if self.autocast:
                stack.enter_context(torch.autocast(tokens.device.type, torch.bfloat16))
            return self.reader.pool(*self.reader.states(backbone_of(self.model), tokens, mask))

    def scorers(self) -> list[RewardMixture]:
        """This model alone."""
        return [self]

    def encoder(
        self, max_length: int | None = None
    ) -> Callable[[Sequence[Text], Sequence[Text]], list[list[int]]]:
        """Return a function from prompts and completions to the token rows that :meth:`forward` reads."""
        return lambda prompts, completions: self.reader.encode(prompts, completions, max_length)

    def reads_tokens_of(self, tokenizer: Any) -> bool:
        """Whether a policy's prompt and response tokens, joined, are what this model reads."""
        # a pad token that only the policy has needs no row here: masks come from lengths, and a sampled one
        # is left out with all other ids beyond the trunk's rows
        return self.reader.layout.kind == "continuation" and same_vocabulary(self.tokenizer, tokenizer)

    # -- training ---------------------------------------------------------------------------------

    @property
    def output(self) -> nn.Linear:
        """The last layer [K, ...], of which every group has a row of its own."""
        return self.model.score if self.heads is None else self.heads.output

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters on top of the trunk."""
        return list((self.model.score if self.heads is None else self.heads).parameters())

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Parameters of the trunk that are trained: all of them, or its adapters'."""
        heads = {id(parameter) for parameter in self.head_parameters()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in heads]

    def train(self, mode: bool = True) -> RewardMixture:
        """Switch the adapters' own dropout; the trunk's stays off, in training too."""
        super().train(False)
        self.dropout = mode
        return self

    def permute_groups_(self, order: Tensor) -> None:
        """Make group ``order[k]`` the new group k: its head, its adapter, its share and its scale."""
        permute_rows_(self.output, order)
        self.log_prior.copy_(self.log_prior[order.to(self.log_prior.device)])
        self.calibration = self.calibration.permute(order.cpu())
        if self.adapters == "per_group":
            lora.permute_adapters_(self.model, self.names, order.tolist())

    def reset_head_(self, k: int, donor: int, noise_scale: float = 0.1) -> None:
        """Start group k anew from the donor's head, with a little noise, and from its adapter."""
        reset_row_(self.output, k, donor, noise_scale)
        if self.adapters == "per_group":
            copy_adapter_(self.model, self.names[donor], self.names[k])
