"""The embedded world with responses of two tokens: small enough to enumerate, so that the optimum is exact.

Reference and utilities are those of the embedded world; prompts are reviews without their last two words,
and a response ends after two tokens or before. Policies are trained by the ordinary PPO stage; what they give
each group, and what the best policies do, is then summed over all responses instead of sampled.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frontier import exact_frontier
from tensordict import TensorDict
from torch import Tensor

from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.diagnosis.exact import policy_utilities
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.models.sequences import backbone_of, predicting_states
from torchrl_maxmin.rewards import Calibration
from torchrl_maxmin.welfare import solve_dual
from torchrl_maxmin.world import World

#: Tokens of a response.
TOKENS = 2
#: Weights of the minority on the exact frontier.
GRID = tuple(np.linspace(0, 1, 101).tolist())


@dataclass(frozen=True)
class Short:
    """What is enumerated.

    Attributes:
        reference: folder of the reference policy.
        policies: name -> folder; all were trained with the same calibration.
        prompts: file of the prompts, all of them.
        world: file of the groups' utilities.
        beta: KL weight of the objective.
        folder: where ``exact.npz`` goes.
    """

    reference: Path
    policies: dict[str, Path]
    prompts: Path
    world: Path
    beta: float
    folder: Path


def measure_short(task: Short) -> None:
    """Write ``exact.npz``.

    ``{policy}``: F_u by prompt and group [X, 2]; ``curve``: of the best policies of fixed weights [W, X, 2];
    ``optimum`` and ``weights`` of the max-min; ``kl/{policy}`` [X]; ``responses``: how many a prompt.
    """
    tokenizer = load_tokenizer(str(task.reference))
    texts = [json.loads(line)["prompt"] for line in task.prompts.read_text().splitlines()]
    prompts = encode_prompts(tokenizer, texts)
    beta = task.beta
    with progress_bar("enumerating responses", len(task.policies) + 2) as advance:
        log_reference = log_probabilities(_load(task.reference, tokenizer), prompts)
        calibrations = [
            Calibration.from_dict(json.loads((path / "summary.json").read_text())["calibration"])
            for path in task.policies.values()
        ]
        world, completions = World.load(task.world), responses(tokenizer)
        raw = torch.from_numpy(np.stack([world([text] * len(completions), completions) for text in texts]))
        rewards = calibrations[0].apply(raw).double().numpy()
        advance()
        solution = solve_dual(torch.from_numpy(rewards), beta, torch.from_numpy(log_reference))
        weights = np.array([[1 - w, w] for w in GRID])
        found = {
            "optimum": np.array(solution.value),
            "weights": solution.weights.numpy(),
            "responses": np.array(len(completions)),
            "curve": exact_frontier(rewards, beta, weights, log_reference),
        }
        advance()
        for (name, path), calibration in zip(task.policies.items(), calibrations, strict=True):
            if calibration.method == "sft_std" and not torch.equal(calibration.shift, calibrations[0].shift):
                raise AssertionError(f"{name} was trained on another scale than the others")
            log_policy = log_probabilities(_load(path, tokenizer), prompts)
            found[name] = policy_utilities(log_policy, rewards, beta, log_reference)
            found[f"kl/{name}"] = (np.exp(log_policy) * (log_policy - log_reference)).sum(axis=1)
            advance(note=name)
    task.folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(task.folder / "exact.npz", **found)


def _load(path: Path, tokenizer: Any) -> TokenPolicy:
    return TokenPolicy.from_pretrained(str(path), tokenizer, max_new_tokens=TOKENS)


def responses(tokenizer: Any) -> list[str]:
    """Texts of all responses, in the order of :func:`log_probabilities`: the empty one first."""
    words = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    first = [word for token, word in enumerate(words) if token != tokenizer.eos_token_id]
    return ["", *(f"{one} {other}".strip() for one in first for other in words)]


@torch.no_grad()
def log_probabilities(policy: TokenPolicy, prompts: TensorDict) -> np.ndarray:
    """Log-probability of every response to every prompt, float64 [X, 1 + (V - 1) V].

    First the response that ends at once, then every other first token with every second one.
    """
    (eos,) = policy.eos_token_ids
    rows = []
    for prompt in prompts.split(1):
        start = _next_token(policy, prompt, torch.empty(1, 0, dtype=torch.int64))[0]
        vocabulary = torch.arange(len(start))
        first = vocabulary[vocabulary != eos]
        then = _next_token(policy, prompt.expand(len(first)), first[:, None])
        rows.append(torch.cat([start[eos : eos + 1], (start[first, None] + then).reshape(-1)]))
    return torch.stack(rows).numpy()


def _next_token(policy: TokenPolicy, prompts: TensorDict, prefix: Tensor) -> Tensor:
    """Log-probabilities [N, V] float64 of the token after ``prefix`` [N, t]."""
    given = prompts.clone()
    given["action"] = torch.nn.functional.pad(prefix, (0, 1))
    given["action_mask"] = torch.ones_like(given["action"], dtype=torch.bool)
    states = predicting_states(backbone_of(policy.model), given)[:, -1]
    logits = policy.model.get_output_embeddings()(states).double() / policy.temperature
    return logits.log_softmax(-1)
