"""Policy and critic around a Hugging Face causal language model, as TensorDict modules."""

from __future__ import annotations

from typing import Any

import torch
from maxmin_kernels import token_log_probs
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from torchrl_maxmin.modules.loading import ensure_pad_token, load_causal_lm, plain_generation
from torchrl_maxmin.modules.sampled_log_probs import SampledLogProbs
from torchrl_maxmin.modules.sequences import backbone_of, hidden_states, mask_after_eos

__all__ = ["TokenCritic", "TokenPolicy", "TokenScorer", "predicting_states"]


def predicting_states(backbone: nn.Module, tensordict: TensorDictBase) -> Tensor:
    """Hidden states [B, R, H] from which each response token is predicted.

    Reads ``prompt_tokens``, ``prompt_mask`` [B, P] (padded left) and ``action``,
    ``action_mask`` [B, R] (padded right). The state at column t has seen the prompt and
    the response up to t - 1. Columns after the longest response are zero.
    """
    prompt, action = tensordict["prompt_tokens"], tensordict["action"]
    action_mask = tensordict["action_mask"]
    longest = max(int(action_mask.sum(-1).max()), 1)
    tokens = torch.cat([prompt, action[:, : longest - 1]], -1)
    mask = torch.cat([tensordict["prompt_mask"], action_mask[:, : longest - 1]], -1)
    states = hidden_states(backbone, tokens, mask)[:, prompt.shape[-1] - 1 :]
    return nn.functional.pad(states, (0, 0, 0, action.shape[-1] - longest))


class TokenPolicy(TensorDictModuleBase):
    """A causal language model that answers padded prompts.

    Calling it samples a response; :meth:`log_prob` scores one that is given. Both use the
    same temperature and nothing else shapes the distribution (no top-k, top-p or
    penalties), so a behaviour log-probability is that of what was sampled.

    Args:
        model: a Hugging Face causal language model.
        eos_token_id: the token that ends a response.
        pad_token_id: what fills the columns after it; must differ from ``eos_token_id``.
        max_new_tokens: columns R of a response.
        temperature: softmax temperature, at sampling and at scoring.

    Reads ``prompt_tokens`` [B, P] int64 and ``prompt_mask`` [B, P] bool, padded left; writes
    ``action`` [B, R] int64, ``action_mask`` [B, R] bool and ``sample_log_prob`` [B, R] fp32
    (zero where masked).

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
        eos_token_id: int,
        pad_token_id: int,
        max_new_tokens: int,
        temperature: float = 1.0,
    ):
        if eos_token_id == pad_token_id:
            raise ValueError(
                f"pad_token_id equals eos_token_id ({eos_token_id}): the policy would never learn to stop; "
                "give the tokenizer a pad token of its own"
            )
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None or getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} adds a bias or a soft cap to its logits, which the chunked "
                "log-probabilities leave out; use a model with a plain lm_head"
            )
        super().__init__()
        plain_generation(model)
        self.in_keys = ["prompt_tokens", "prompt_mask"]
        self.out_keys = ["action", "action_mask", "sample_log_prob"]
        self.model = model
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, tokenizer: Any, *, max_new_tokens: int, temperature: float = 1.0
    ) -> TokenPolicy:
        """Load a Hugging Face model; tokenizer and model get a pad token of their own if they lack one."""
        model = load_causal_lm(name_or_path)
        ensure_pad_token(tokenizer, model)
        return cls(
            model,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Sample a response to every prompt; its log-probabilities are those that it was drawn with."""
        prompt = tensordict["prompt_tokens"]
        sampled = SampledLogProbs(self.temperature)
        with torch.no_grad():
            generated = self.model.generate(
                input_ids=prompt,
                attention_mask=tensordict["prompt_mask"].long(),
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.eos_token_id,
                pad_token_id=self.pad_token_id,
                logits_processor=[sampled],
            )[:, prompt.shape[-1] :]
            log_prob = sampled.finish(generated[:, -1])
            # generate() returns early only when every row has ended: what is missing is padding
            short = self.max_new_tokens - generated.shape[-1]
            action = nn.functional.pad(generated, (0, short), value=self.pad_token_id)
            action_mask = mask_after_eos(action, self.eos_token_id)
            tensordict["action"] = action.masked_fill(~action_mask, self.pad_token_id)
            tensordict["action_mask"] = action_mask
            log_prob = nn.functional.pad(log_prob, (0, short))
            tensordict["sample_log_prob"] = torch.where(action_mask, log_prob, 0.0)
        return tensordict

    def log_prob(self, tensordict: TensorDictBase) -> Tensor:
        """Log-probabilities [B, R] of ``action`` given the prompt; zero where masked."""
        return self.log_prob_and_entropy(tensordict, entropy=False)[0]

    def log_prob_and_entropy(
        self, tensordict: TensorDictBase, entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and token entropies, both [B, R] and zero where masked."""
        action, mask = tensordict["action"], tensordict["action_mask"]
        states = predicting_states(backbone_of(self.model), tensordict)
        head = self.model.get_output_embeddings()
        log_prob, token_entropy = token_log_probs(
            states[mask], head.weight, action[mask], temperature=self.temperature, entropy=entropy
        )
        blank = torch.zeros(action.shape, dtype=log_prob.dtype, device=action.device)
        scattered = blank.masked_scatter(mask, log_prob)
        return scattered, None if token_entropy is None else blank.masked_scatter(mask, token_entropy)


class TokenCritic(TensorDictModuleBase):
    """A trunk with one value head a group, and one for the KL penalty where there is one.

    Group weights move every iteration and the value of a group does not, so heads of their
    own keep every group's advantage valid whatever the weights are.

    Args:
        backbone: a Hugging Face trunk of its own (not shared with the policy).
        num_columns: value heads; groups, plus one for the KL column.

    Reads what :func:`predicting_states` reads; writes ``state_value`` [B, R, num_columns] fp32.
    """

    def __init__(self, backbone: nn.Module, num_columns: int):
        super().__init__()
        self.in_keys = ["prompt_tokens", "prompt_mask", "action", "action_mask"]
        self.out_keys = ["state_value"]
        self.backbone = backbone
        # drawing nothing: a run's random numbers do not depend on the number of groups
        self.head = nn.utils.skip_init(nn.Linear, backbone.config.hidden_size, num_columns)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value`` [B, R, num_columns]."""
        states = predicting_states(self.backbone, tensordict)
        tensordict["state_value"] = self.head(states.to(self.head.weight.dtype)).float()
        return tensordict


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
        self.in_keys = ["prompt_tokens", "prompt_mask", "action", "action_mask"]
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
