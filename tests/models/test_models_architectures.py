"""Every architecture: what is sampled is what is trained on, or one line says why it cannot be a policy.

The table of what was measured stands in the summary of the test run.
"""

import json

import pytest
import torch
from architectures import REFUSED, SERVED, write

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig

PROMPTS = ["the film", "i finished this", "its", "a tender villain had a long story", "its cast was"]
EPS = torch.finfo(torch.float32).eps


def sampled(policy, tokenizer):
    torch.manual_seed(0)
    return sample_responses(policy, encode_prompts(tokenizer, PROMPTS), num_samples=8)


def ppo_row(folder, tmp_path):
    """The metrics of one iteration of PPO with learning rate 0."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    config = PPOConfig(
        model_name_or_path=folder,
        dataset_name=str(prompts),
        output_dir=str(tmp_path / "ppo"),
        reward_funcs=["architectures:brevity", "architectures:letters"],
        calibration="none",
        calibration_prompts=2,
        num_iterations=1,
        rollout_batch_size=8,
        mini_batch_size=4,
        num_ppo_epochs=1,
        learning_rate=0.0,
        response_length=6,
        device="cpu",
    )
    run_ppo(config)
    (row,) = read_metrics(config.output_dir)
    return row


@pytest.mark.parametrize("name", SERVED)
def test_what_is_sampled_is_what_is_trained_on(name, tokenizer, tmp_path, record_property):
    folder = write(name, tokenizer, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    policy, again = (TokenPolicy.from_pretrained(folder, tokenizer, max_new_tokens=8) for _ in range(2))
    batch = sampled(policy, tokenizer)
    mask = batch["action_mask"]
    assert len(set(batch["prompt_mask"].sum(-1).tolist())) == 4  # ragged
    with torch.no_grad():
        trained, reference = policy.log_prob(batch), again.log_prob(batch)
        inputs = {"input_ids": batch["prompt_tokens"], "attention_mask": batch["prompt_mask"].long()}
        largest = float(policy.model(**inputs).logits.abs().max())
    apart = float((trained - batch["sample_log_prob"]).abs().max())
    kl = float((batch["sample_log_prob"] - reference).sum(-1).mean())
    row = ppo_row(folder, tmp_path)
    head = policy.head
    record_property(
        "architecture",
        (
            name,
            f"|rollout - training| {apart:.1e}  ratio - 1 {row['val/ratio'] - 1:+.1e}  "
            f"KL in ppo {row['objective/kl']:+.1e}  in evaluate {kl:+.1e}  "
            f"scale {head.logit_scale:.3g}  soft cap {head.softcap or '-'}  "
            f"bias {'yes' if policy.model.get_output_embeddings().bias is not None else '-'}",
        ),
    )
    assert batch["sample_log_prob"][mask].std() > 0.3  # far from uniform, where any head would do
    # cached keys and whole sequences sum in another order: some roundings of the largest logit (6 to 13 seen)
    bound = max(1e-5, 32 * EPS * largest)
    assert apart <= bound
    assert abs(kl) < 1e-4
    assert abs(row["objective/kl"]) <= 6 * bound  # a sum over the tokens of a response
    assert row["val/ratio"] == pytest.approx(1.0, abs=2 * bound)
    assert row["policy/clipfrac_avg"] == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_policy_is_refused_in_one_line(name, tokenizer, tmp_path, record_property):
    folder = write(name, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match=REFUSED[name][-1]) as caught:
        TokenPolicy.from_pretrained(folder, load_tokenizer(folder), max_new_tokens=8)
    line = str(caught.value)
    assert "\n" not in line
    record_property("architecture", (name, f"refused: {line}".replace(folder, "FOLDER")))


def test_as_many_architectures_as_promised():
    assert len(SERVED) + len(REFUSED) >= 24
