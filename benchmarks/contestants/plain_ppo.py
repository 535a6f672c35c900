"""MaxMin PPO with LoRA as one writes it by hand in PyTorch, transformers and peft: a contestant.

One trunk: the policy is it with an adapter, the reference it without (``disable_adapter``), the critic it
with another and with K + 1 value heads, the last of them for the KL penalty. Nothing here is the package's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Batch = dict[str, Tensor]
Reward = Callable[..., list[float]]


@dataclass
class PlainSettings:
    rollout_batch_size: int = 64
    mini_batch_size: int = 16
    num_ppo_epochs: int = 1
    response_length: int = 32
    lora_r: int = 16
    learning_rate: float = 3e-6
    cliprange: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    beta: float = 0.05
    max_grad_norm: float = 1.0
    missing_eos_penalty: float = 1.0
    tau: float = 0.1


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


class PlainPPO:
    """Algorithm 1 of MaxMin-RLHF for a language model.

    Args:
        name: model folder.
        prompts: texts.
        rewards: K functions ``f(prompts, completions) -> list[float]``.
        settings: hyperparameters.
    """

    def __init__(self, name: str, prompts: Sequence[str], rewards: Sequence[Reward], settings: PlainSettings):
        self.prompts, self.rewards, self.settings = list(prompts), list(rewards), settings
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        if self.tokenizer.pad_token_id in (None, self.tokenizer.eos_token_id):
            self.tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            base.resize_token_embeddings(len(self.tokenizer))
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base, lora).eval()
        self.model.add_adapter("critic", lora)
        self.trunk = base.model
        self.heads = nn.Linear(base.config.hidden_size, len(rewards) + 1)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        named = list(self.model.named_parameters())
        self.policy_parameters = [p for name, p in named if "lora_" in name and ".default." in name]
        self.critic_parameters = [p for name, p in named if "lora_" in name and ".critic." in name]
        self.critic_parameters += self.heads.parameters()
        self.optimizer = torch.optim.AdamW(
            [*self.policy_parameters, *self.critic_parameters], lr=settings.learning_rate, weight_decay=0.0
        )
        self.log_weights = torch.zeros(len(rewards)).log_softmax(-1)
        self.scale: tuple[Tensor, Tensor] | None = None
        self.order = iter(())

    # -- one iteration ------------------------------------------------------------------------------------

    def iterate(self) -> dict[str, float]:
        """Sample, score, estimate, update; returns metrics."""
        batch = self.sample()
        rewards = self.score(batch)
        batch["ref_log_prob"] = self.reference_log_probs(batch)
        batch["value"] = self.values_of(batch)
        self.advantages(batch, rewards, self.group_weights(rewards.mean(0)))
        metrics = self.update(batch)
        mask = batch["action_mask"]
        kl = ((batch["log_prob"] - batch["ref_log_prob"]) * mask).sum(-1).mean()
        metrics |= {"kl": kl.item(), "length": mask.sum(-1).float().mean().item()}
        return metrics | {f"rewards/{k}": value for k, value in enumerate(rewards.mean(0).tolist())}

    @torch.no_grad()
    def sample(self) -> Batch:
        """Responses to the next prompts, with the log-probabilities that they were drawn with."""
        rows = []
        while len(rows) < self.settings.rollout_batch_size:
            row = next(self.order, None)
            if row is None:
                self.order = iter(torch.randperm(len(self.prompts)).tolist())
            else:
                rows.append(row)
        texts = [self.prompts[row] for row in rows]
        prompts = self.tokenizer(texts, return_tensors="pt", padding=True)
        self.model.set_adapter("default")
        output = self.model.generate(
            **prompts,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.settings.response_length,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        action = output.sequences[:, prompts.input_ids.shape[1] :]
        ended = (action == self.tokenizer.eos_token_id).int()
        steps = zip(output.scores, action.T, strict=True)
        log_prob = torch.stack(
            [scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for scores, tokens in steps], 1
        )
        return {
            "row": torch.tensor(rows),
            "prompt_tokens": prompts.input_ids,
            "prompt_mask": prompts.attention_mask.bool(),
            "action": action,
            "action_mask": ended.cumsum(-1) - ended == 0,
            "log_prob": log_prob,
        }

    def score(self, batch: Batch) -> Tensor:
        """Rewards [B, K], of mean 0 and deviation 1 in the first batch, less the penalty for no end."""
        texts = self.tokenizer.batch_decode(batch["action"], skip_special_tokens=True)
        prompts = [self.prompts[row] for row in batch["row"].tolist()]
        raw = torch.tensor([reward(prompts=prompts, completions=texts) for reward in self.rewards]).T
        if self.scale is None:
            self.scale = raw.mean(0), raw.std(0)
        ended = (batch["action"] == self.tokenizer.eos_token_id).any(-1, keepdim=True)
        return (raw - self.scale[0]) / self.scale[1] - self.settings.missing_eos_penalty * ~ended

    def group_weights(self, utilities: Tensor) -> Tensor:
        """The adversary's move: w proportional to w^(1 - eta tau) exp(-eta u), with eta tau = 1/2."""
        self.log_weights = (0.5 * self.log_weights - 0.5 / self.settings.tau * utilities).log_softmax(-1)
        return self.log_weights.exp()

    # -- networks -----------------------------------------------------------------------------------------

    def inputs(self, batch: Batch) -> dict[str, Any]:
        mask = torch.cat([batch["prompt_mask"], batch["action_mask"]], 1).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        tokens = torch.cat([batch["prompt_tokens"], batch["action"]], 1)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "use_cache": False}

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, R] of the responses under the adapter that is at work."""
        kept = batch["action"].shape[1] + 1
        logits = self.model(**self.inputs(batch), logits_to_keep=kept).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, batch["action"][..., None])[..., 0]

    def values(self, batch: Batch) -> Tensor:
        """Values [B, R, K + 1] of the states before each token of the responses."""
        self.model.set_adapter("critic")
        states = self.trunk(**self.inputs(batch)).last_hidden_state
        return self.heads(states[:, batch["prompt_tokens"].shape[1] - 1 : -1])

    def parts(self, batch: Batch, order: Tensor) -> list[Batch]:
        rows = order.split(self.settings.mini_batch_size)
        return [{name: tensor[some] for name, tensor in batch.items()} for some in rows]

    def whole(self, batch: Batch) -> list[Batch]:
        return self.parts(batch, torch.arange(len(batch["row"])))

    @torch.no_grad()
    def reference_log_probs(self, batch: Batch) -> Tensor:
        with self.model.disable_adapter():
            return torch.cat(
                [self.log_probs(part) for part in self.parts(batch, torch.arange(len(batch["row"])))]
            )

    @torch.no_grad()
    def values_of(self, batch: Batch) -> Tensor:
        return torch.cat([self.values(part) for part in self.whole(batch)])

    # -- losses -------------------------------------------------------------------------------------------

    def advantages(self, batch: Batch, rewards: Tensor, weights: Tensor) -> None:
        """Write whitened advantages [B, R] of the weighted groups, and value targets [B, R, K + 1]."""
        given, mask, value = self.settings, batch["action_mask"], batch["value"]
        last = mask & ~nn.functional.pad(mask, (0, 1))[:, 1:]
        paid = last[..., None] * rewards[:, None]
        penalty = -given.beta * (batch["log_prob"] - batch["ref_log_prob"])
        reward = torch.cat([paid, penalty[..., None]], -1)
        columns, following = torch.zeros_like(value), torch.zeros_like(value[:, 0])
        for t in reversed(range(value.shape[1])):
            goes_on = (mask[:, t] & ~last[:, t])[:, None]
            next_value = value[:, t + 1] * goes_on if t + 1 < value.shape[1] else 0.0
            delta = reward[:, t] + given.gamma * next_value - value[:, t]
            following = (delta + given.gamma * given.lam * following * goes_on) * mask[:, t, None]
            columns[:, t] = following
        batch["value_target"] = columns + value
        advantage = columns @ torch.cat([weights, torch.ones(1)])
        centred = advantage - masked_mean(advantage, mask)
        batch["advantage"] = centred * (masked_mean(centred**2, mask) + 1e-8).rsqrt()

    def policy_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        mask, advantage = batch["action_mask"], batch["advantage"]
        self.model.set_adapter("default")
        log_ratio = (self.log_probs(batch) - batch["log_prob"]) * mask
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.settings.cliprange, 1 + self.settings.cliprange)
        loss = masked_mean(-torch.minimum(ratio * advantage, clipped * advantage), mask)
        with torch.no_grad():
            share = masked_mean((ratio != clipped).float(), mask)
            metrics = {"loss/policy": loss, "clipfrac": share, "approxkl": masked_mean(-log_ratio, mask)}
        return loss, metrics

    def value_loss(self, batch: Batch) -> Tensor:
        error = (self.values(batch) - batch["value_target"]) ** 2
        return masked_mean(error.mean(-1), batch["action_mask"])

    def update(self, batch: Batch) -> dict[str, float]:
        """Steps on minibatches; returns the mean of their metrics."""
        records = []
        for _ in range(self.settings.num_ppo_epochs):
            for part in self.parts(batch, torch.randperm(len(batch["row"]))):
                loss, metrics = self.policy_loss(part)
                self.optimizer.zero_grad()
                loss.backward()
                value_loss = self.value_loss(part)
                value_loss.backward()
                for parameters in (self.policy_parameters, self.critic_parameters):
                    nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
                self.optimizer.step()
                records.append({**metrics, "loss/value": value_loss})
        return {
            name: sum(float(record[name].detach()) for record in records) / len(records)
            for name in records[0]
        }
