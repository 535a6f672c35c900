"""A real chat model through the four verbs, and one score for one completion wherever it is read.

    python reproductions/real_model/run.py [--model_name_or_path runs/smollm2] [--runs runs/real_model]

Makes SmolLM2-135M-Instruct where it is not there yet, lets it answer 24 chat prompts, lets simulated people
choose between its answers, and runs sft (2 steps), reward (2 steps), ppo (2 iterations) and evaluate on messages.
Then the scores that ppo gave and those that evaluate gives are compared, completion by completion. Writes
results.json, results.csv and results.md beside this file; exits with 1 where a difference is above 1e-5.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chats import PROMPTS, write_chats
from scores import Comparison, RecordedRewards, classifier_scores, write_scores
from smollm2 import DEFAULT_FOLDER, make

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.evaluation.judging import UtilityJudge, load_judge
from torchrl_maxmin.evaluation.measure import EvaluateConfig, run_evaluate
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.modules import TokenPolicy
from torchrl_maxmin.modules.loading import load_tokenizer
from torchrl_maxmin.modules.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.progress import console
from torchrl_maxmin.rewards import load_reward_model
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.trainers.ppo import PPOTrainer
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import RewardConfig, run_reward
from torchrl_maxmin.trainers.run import prepare_output_dir, seed_everything, write_json
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft

HERE = Path(__file__).parent
#: tokens of a response: enough for some to end, few enough that others are cut off
RESPONSE_LENGTH = 48
BAR = 1e-5


def sample_answers(
    model: Path, conversations: Sequence[Any], num_answers: int = 3, tokens: int = 64, seed: int = 0
) -> list[list[str]]:
    """Answers [N][n] of a chat model at temperature 1."""
    tokenizer = load_tokenizer(str(model))
    policy = TokenPolicy.from_pretrained(str(model), tokenizer, max_new_tokens=tokens)
    torch.manual_seed(seed)
    sampled = sample_responses(policy, encode_prompts(tokenizer, conversations), num_answers, batch_size=24)
    texts = to_texts(tokenizer, sampled)[1]
    return [texts[i : i + num_answers] for i in range(0, len(texts), num_answers)]
