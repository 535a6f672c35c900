"""A policy around a Hugging Face causal language model, as TensorDict modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from maxmin_kernels import token_log_probs
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import of_main_process, over_ranks, shares_rows
from torchrl_maxmin.masks import ROW_LENGTHS, row_lengths, to_device
from torchrl_maxmin.models.checks import check_model
from torchrl_maxmin.models.decoding import (
    LARGE_VOCABULARY,
    NUMBERS,
    GivenNumbers,
    StopStrings,
    truncating_warpers,
)
from torchrl_maxmin.models.loading import (
    end_tokens,
    ensure_pad_token,
    load_causal_lm,
    plain_generation,
)
from torchrl_maxmin.models.output_head import OutputHead
from torchrl_maxmin.models.sequences import (
    NO_TOKENS,
    Ends,
    backbone_of,
    in_length_buckets,
    mask_after_eos,
    predicting_states,
)

__all__ = ["SCORED", "TokenPolicy", "TokenScorer"]

#: what scoring a response reads
SCORED = ("prompt_tokens", "prompt_mask", "action", "action_mask")


@dataclass
class SampledLogProbs:
    """A logits processor that remembers how likely sampled tokens were; all that it changes is to truncate.

    A token is known one call after its scores: only one step's scores are held, never [B, R, V].

    Attributes:
        temperature: of the sampling; processors of the caller's see scores that are not divided yet.
        warpers: what truncates the scores; they are divided here then, and sampled as they come out.
        columns: the log-probabilities [B] in fp32 of every column but the last, which a last call adds.
        log_mass: log [B] in fp32 of the probability that the tokens left hold, where there are warpers.
        scores: those of the last call.
    """

    temperature: float = 1.0
    warpers: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    columns: list[Tensor] = field(default_factory=list)
    log_mass: list[Tensor] = field(default_factory=list)
    scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor | None:
        """Take the scores [B, V] of the next token, None after the last, given all tokens [B, T]."""
        if self.scores is not None:
            last = self.scores.float()
            if self.temperature != 1.0 and not self.warpers:
                last = last / self.temperature
            self.columns.append(-nn.functional.cross_entropy(last, input_ids[:, -1], reduction="none"))
        if self.warpers and scores is not None:
            whole = scores = scores.float() / self.temperature
            for warper in self.warpers:
                scores = warper(input_ids, scores)
            self.log_mass.append(scores.logsumexp(-1) - whole.logsumexp(-1))
        self.scores = scores
        return scores


# generate() asks for it at every token, and working it out takes longer than the log-probability.
SampledLogProbs.__call__.__signature__ = inspect.signature(SampledLogProbs.__call__)  # type: ignore[attr-defined]


class TokenPolicy(TensorDictModuleBase):
    """A causal language model that answers padded prompts.

    Calling it samples a response; :meth:`log_prob` scores one that is given. Both use the
    same temperature, and a behaviour log-probability is that of what was sampled: with ``top_k`` or
    ``top_p`` that of the truncated distribution, where :meth:`log_prob` is that of the whole one. Nothing
    else (penalties) shapes it. What the model does to its logits (scale, soft cap, bias) is read off its
    behaviour, see :class:`~torchrl_maxmin.models.output_head.OutputHead`.

    Args:
        model: a Hugging Face causal language model.
        eos_token_id: the token, or the several tokens, that end a response; those of the model's own
            ``generation_config`` do too, and all of them are saved with it.
        pad_token_id: what fills the columns after it; must differ from all of them.
        max_new_tokens: columns R of a response.
        temperature: softmax temperature, at sampling and at scoring.
        generation_batch_size: most prompts answered at once, those of like length together; None for all of
            a call.
        top_k: sample from so many likeliest tokens; 0 takes all.
        top_p: sample from the likeliest tokens that hold so much probability together; 1 takes all.
        stop_strings: strings that end a response, see :class:`~torchrl_maxmin.models.decoding.StopStrings`.
        tokenizer: the model's, which stop strings need.

    Reads ``prompt_tokens`` [B, P] int64 and ``prompt_mask`` [B, P] bool, padded left, and where they are
    given the numbers in [0, 1) that the tokens are drawn by, ``drawn_by`` [B, R]; writes
    ``action`` [B, R] int64, ``action_mask`` [B, R] bool and ``sample_log_prob`` [B, R] fp32
    (zero where masked); with ``top_k`` or ``top_p`` also ``whole_log_prob`` [B, R] fp32, which is less by the
    log of the probability that the tokens left hold together.

    Attributes:
        eos_token_ids: every token that ends a response, those given first.
        ends: what ends a response: these tokens, or what marks them and the stop strings.
        truncated: whether ``top_k`` or ``top_p`` leaves tokens out.
        head: what stands between hidden states and logits.
        within: makes what the model runs in, such as the adapter that is this policy's; nothing by default.
        compute_dtype: what the model computes in, where not its weights' dtype.
        keep_states: whether the hidden states of :meth:`log_prob_and_entropy` stay for :meth:`take_states`,
            where gradients are taken.

    Raises:
        ValueError: for a pad token that ends a response, stop strings without a tokenizer, or a model whose
            logits are not a linear layer of its hidden states, scaled or soft-capped at most.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> policy = TokenPolicy(GPT2LMHeadModel(config), eos_token_id=2, pad_token_id=0, max_new_tokens=5)
        >>> prompts = TensorDict({
        ...     "prompt_tokens": torch.full((3, 2), 7), "prompt_mask": torch.ones(3, 2, dtype=torch.bool)
        ... }, [3])
        >>> policy(prompts)["sample_log_prob"].shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generation_batch_size: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
    ):
        eos_token_ids = end_tokens(model, eos_token_id)
        if pad_token_id in eos_token_ids:
            raise ValueError(
                f"pad_token_id equals eos_token_id ({pad_token_id}): the policy would never learn to stop; "
                "give the tokenizer a pad token of its own"
            )
        if stop_strings and tokenizer is None:
            raise ValueError("stop_strings are looked for in the tokenizer's text: give the tokenizer, too")
        super().__init__()
        plain_generation(model, eos_token_ids)
        self.warpers = truncating_warpers(top_k, top_p)
        self.truncated = bool(self.warpers)
        self.stops = StopStrings(stop_strings, tokenizer, eos_token_ids) if stop_strings else None
        self.ends: Ends = self.stops or eos_token_ids
        self.in_keys = ["prompt_tokens", "prompt_mask"]
        self.out_keys = ["action", "action_mask", "sample_log_prob"]
        if self.truncated:
            self.out_keys.append("whole_log_prob")
        self.model = model
        self.head = OutputHead.read(model)
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.generation_batch_size = generation_batch_size
        self.within: Callable[[], AbstractContextManager[Any]] = nullcontext
        quantization = getattr(model.config, "quantization_config", None)
        self.compute_dtype: torch.dtype | None = getattr(quantization, "bnb_4bit_compute_dtype", None)
        self.keep_states = False
        self._states: tuple[TensorDictBase, Tensor] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        generation_batch_size: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_strings: Sequence[str] = (),
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> TokenPolicy:
        """Load a Hugging Face model, and check that what it samples is what it is trained on.

        Tokenizer and model get a pad token of their own if they lack one.

        Args:
            name_or_path: folder or hub name.
            tokenizer: the model's.
            max_new_tokens: as of the class.
            temperature: as of the class.
            generation_batch_size: as of the class.
            top_k: as of the class.
            top_p: as of the class.
            stop_strings: as of the class.
            device: where to.
            **options: how to load it, see :func:`~torchrl_maxmin.models.loading.load_causal_lm`.

        Raises:
            UserError: for a model that cannot be had, or that the package cannot serve.
        """
        model = load_causal_lm(name_or_path, **options)
        ensure_pad_token(tokenizer, model)
        policy = cls(
            model.to(device),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generation_batch_size=generation_batch_size,
            top_k=top_k,
            top_p=top_p,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
        )
        check_model(policy)
        return policy

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase, max_new_tokens: int | None = None) -> TensorDictBase:
        """Sample a response to every prompt; its log-probabilities are those that it was drawn with.

        Processes that work as one answer a share each, every row drawn by random numbers of its own, so that
        the number of processes changes nothing; so are large vocabularies in one process: faster on a CPU.

        Args:
            tensordict: prompts [B].
            max_new_tokens: columns of a response, where not those of the policy.

        Raises:
            ValueError: for a prompt without tokens.
        """
        max_new_tokens = max_new_tokens or self.max_new_tokens
        if not shares_rows() and self.model.get_output_embeddings().weight.shape[0] < LARGE_VOCABULARY:
            return self._answer(tensordict, max_new_tokens)
        prompts, shape = tensordict.select(*self.in_keys), (len(tensordict), max_new_tokens)
        prompts[NUMBERS] = of_main_process(lambda: torch.rand(shape)).to(prompts["prompt_tokens"].device)
        answers = over_ranks(lambda part: self._answer(part, max_new_tokens).select(*self.out_keys), prompts)
        return tensordict.update(answers)

    def _answer(self, tensordict: TensorDictBase, max_new_tokens: int) -> TensorDictBase:
        size = self.generation_batch_size or len(tensordict)
        if len(tensordict) > size:
            prompts = tensordict.select(*self.in_keys, NUMBERS, strict=False)
            answer = partial(self._answer, max_new_tokens=max_new_tokens)
            return tensordict.update(in_length_buckets(answer, prompts, size))
        prompt, prompt_mask = tensordict["prompt_tokens"], tensordict["prompt_mask"]
        if int(prompt_mask.sum(-1).min()) < 1:
            raise ValueError(NO_TOKENS)
        width = prompt.shape[-1]
        sampled = SampledLogProbs(self.temperature, self.warpers)
        options: dict[str, Any] = {"logits_processor": [sampled]}
        temperature = 1.0 if self.truncated else self.temperature
        if (numbers := tensordict.get(NUMBERS, None)) is None:
            options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        else:
            options |= {"do_sample": False}
            options["logits_processor"].append(GivenNumbers(numbers, width, temperature))
        if self.stops is not None:
            completed = self.stops.completed
            options["stopping_criteria"] = [lambda tokens, *_, **__: completed(tokens[:, width:])]
        with self.within():
            generated = self.model.generate(
                input_ids=prompt,
                attention_mask=prompt_mask.long(),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(self.eos_token_ids),
                pad_token_id=self.pad_token_id,
                **options,
            )[:, width:]
        sampled(generated, None)
        # generate() returns early only when every row has ended: what is missing is padding
        short = max_new_tokens - generated.shape[-1]
        action = nn.functional.pad(generated, (0, short), value=self.pad_token_id)
        action_mask = mask_after_eos(action, self.ends)
        tensordict["action"] = action.masked_fill(~action_mask, self.pad_token_id)
        tensordict["action_mask"] = action_mask
        log_probs = {"sample_log_prob": torch.stack(sampled.columns, -1)}
        if self.truncated:
            log_probs["whole_log_prob"] = log_probs["sample_log_prob"] + torch.stack(sampled.log_mass, -1)
        for key, log_prob in log_probs.items():
            padded = nn.functional.pad(log_prob, (0, short))
            tensordict[key] = torch.where(action_mask, padded, 0.0)
        return tensordict

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.compute_dtype or self.model.get_output_embeddings().weight.dtype

    def states(self, tensordict: TensorDictBase) -> Tensor:
        """Hidden states [B, R, H] from which each response token is predicted."""
        with self.within():
            return predicting_states(backbone_of(self.model), tensordict)

    def take_states(self, tensordict: TensorDictBase) -> Tensor:
        """The hidden states, without gradient: those that the last scoring kept for the same tokens, once.

        Others are computed. A loss that scores and then values the same rows runs the model once.
        """
        kept, self._states = self._states, None
        if kept is not None and _same_rows(kept[0], tensordict):
            return kept[1]
        with torch.no_grad():
            return self.states(tensordict)

    def log_prob(self, tensordict: TensorDictBase) -> Tensor:
        """Log-probabilities [B, R] of ``action`` given the prompt; zero where masked."""
        return self.log_prob_and_entropy(tensordict, entropy=False)[0]

    def log_prob_and_entropy(
        self, tensordict: TensorDictBase, entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and token entropies, both [B, R] and zero where masked."""
        action, mask = tensordict["action"], tensordict["action_mask"]
        lengths = row_lengths(tensordict)
        # given to the trunk too, which would wait for the same lengths
        states = self.states(tensordict.copy().set_non_tensor(ROW_LENGTHS, lengths))
        if self.keep_states and torch.is_grad_enabled():  # no rollout's states stay in memory
            self._states = tensordict.select(*SCORED, ROW_LENGTHS, strict=False), states.detach()
        output = self.model.get_output_embeddings()
        bias = getattr(output, "bias", None)
        if bias is not None and self.head.bias_scale != 1.0:
            bias = bias * self.head.bias_scale
        index = to_device(lengths.token_index(action.shape[-1]), action.device)
        log_prob, token_entropy = token_log_probs(
            states.flatten(0, 1).index_select(0, index).to(output.weight.dtype),
            output.weight,
            action.flatten().index_select(0, index),
            temperature=self.temperature,
            entropy=entropy,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            bias=bias,
        )
        blank = torch.zeros(action.numel(), dtype=log_prob.dtype, device=action.device)
        log_prob = blank.index_copy(0, index, log_prob).view(action.shape).masked_fill(~mask, 0.0)
        if token_entropy is not None:
            token_entropy = blank.index_copy(0, index, token_entropy).view(action.shape)
            token_entropy = token_entropy.masked_fill(~mask, 0.0)
        return log_prob, token_entropy


def _same_rows(kept: TensorDictBase, tensordict: TensorDictBase) -> bool:
    """Whether two batches are the same rows: by what the host has of them, where it has anything."""
    lengths = kept.get_non_tensor(ROW_LENGTHS, None)
    if lengths is not None:
        return lengths is tensordict.get_non_tensor(ROW_LENGTHS, None)
    return all(torch.equal(kept[key], tensordict[key]) for key in SCORED)


class TokenScorer(TensorDictModuleBase):
    """The policy as ``MaxMinPPOLoss`` reads it: log-probability and entropy of given responses.

    Args:
        policy: the policy to score with; its parameters are shared.
        entropy: also write ``entropy`` (an entropy bonus needs it).

    Reads ``prompt_tokens``, ``prompt_mask``, ``action``, ``action_mask``; writes ``log_prob``
    and, if asked, ``entropy``, both [B, R].
    """

    def __init__(self, policy: TokenPolicy, entropy: bool = False):
        super().__init__()
        self.in_keys = list(SCORED)
        self.out_keys = ["log_prob", "entropy"] if entropy else ["log_prob"]
        self.policy = policy
        self.entropy = entropy

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Score ``action``."""
        log_prob, entropy = self.policy.log_prob_and_entropy(tensordict, entropy=self.entropy)
        tensordict["log_prob"] = log_prob
        if entropy is not None:
            tensordict["entropy"] = entropy
        return tensordict
