"""Policy runs with stop strings and truncated sampling, and how often a run samples."""

import json

import pytest
import torch
from rounding import TINY_MODEL, log_prob_bar
from trainers_runs import PPORun
from transformers import AutoTokenizer

from torchrl_maxmin.cli.parsing import parse_config
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.rollouts.certificate import policy_certificate
from torchrl_maxmin.rollouts.language import LanguageRollouts
from torchrl_maxmin.trainers.ppo_config import PPOConfig


def metrics_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def common_token(folder, prompts, tokenizer):
    """The text of the ordinary token that a policy says most often."""
    policy = TokenPolicy.from_pretrained(folder, tokenizer, max_new_tokens=6)
    torch.manual_seed(0)
    batch = policy(encode_prompts(tokenizer, prompts * 20))
    counts = batch["action"][batch["action_mask"]].bincount(minlength=len(tokenizer))
    counts[tokenizer.all_special_ids] = 0
    return tokenizer.decode([int(counts.argmax())])


def test_a_stop_string_ends_responses_as_an_end_token_does(make_config, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    word = common_token(tiny_model, ["the film", "we loved it"], tokenizer)
    run = PPORun(make_config(stop_strings=[word], missing_eos_penalty=100.0, rollout_batch_size=64))
    rollouts = [next(iter(run.rollouts)) for _ in range(4)]
    stopped = 0
    for rollout in rollouts:
        for action, mask, reward in zip(
            rollout["action"], rollout["action_mask"], rollout["next", "group_reward"], strict=True
        ):
            row = action[mask].tolist()
            text = [tokenizer.decode([token]) for token in row]
            assert word not in text[:-1]
            ended = text[-1] == word or row[-1] == tokenizer.eos_token_id
            stopped += text[-1] == word
            assert ended or len(row) == 6
            assert bool((reward > -50).all()) == ended  # the rest pays the penalty
    assert stopped > 2


def test_a_run_with_both_trains(make_config):
    run = PPORun(make_config(stop_strings=["."], top_p=0.9, top_k=40, generation_batch_size=3)).train()
    assert len(metrics_of(run)) == 4


def test_a_reward_model_reads_a_stopped_response_as_one_that_ended(tiny_model, tokenizer):
    torch.manual_seed(0)
    mixture = RewardMixture.from_causal_lm(tiny_model, 2)
    prompts = ["the film", "we loved it"]
    word = common_token(tiny_model, prompts, tokenizer)
    policy = TokenPolicy.from_pretrained(tiny_model, tokenizer, max_new_tokens=6, stop_strings=[word])
    batch = encode_prompts(tokenizer, prompts)
    batch = policy(batch[torch.arange(2).repeat_interleave(60)])
    rewards = MixtureRewards(mixture, tokenizer, prompts, policy.ends)(batch)
    ends, special = 0, set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    for row, reward in zip(batch, rewards, strict=True):
        *begun, last = row["action"][row["action_mask"]].tolist()
        if {*begun, last} & special or tokenizer.eos_token_id in begun:
            continue  # a text has none
        tokens = torch.cat([row["prompt_tokens"][row["prompt_mask"]], row["action"][row["action_mask"]]])
        words = tokens.tolist()
        if tokenizer.decode(words[-1:]) == word:
            words.append(tokenizer.eos_token_id)
            ends += 1
        with torch.no_grad():
            expected = mixture(torch.tensor([words]), torch.ones(1, len(words), dtype=torch.bool))[0]
        torch.testing.assert_close(reward, expected, atol=1e-5, rtol=1e-5)
    assert ends > 2


def test_the_ratio_is_1_and_the_kl_that_of_the_truncated_policy(make_config, tiny_model):
    """Responses of one token: the exact KL of the truncated policy to the whole reference is a sum."""
    size = 2400
    config = make_config(
        top_k=12,
        top_p=0.8,
        temperature=0.9,
        response_length=1,
        rollout_batch_size=size,
        mini_batch_size=size,
        num_ppo_epochs=1,
        num_iterations=1,
        calibration="none",
    )
    run = PPORun(config)
    policy, prompts = run.policy, run.rollouts.prompts
    with torch.no_grad():
        whole = torch.stack(
            [
                (policy.model(input_ids=row["prompt_tokens"][row["prompt_mask"]][None]).logits[0, -1] / 0.9)
                .double()
                .log_softmax(-1)
                for row in prompts
            ]
        )
    best = whole.topk(12).values
    within = best - best.logsumexp(-1, keepdim=True)
    stays = within.exp().cumsum(-1) - within.exp() < 0.8
    log_mass = best.masked_fill(~stays, -torch.inf).logsumexp(-1, keepdim=True)
    share = (best - log_mass).exp() * stays
    expected = -(log_mass.squeeze(-1)).mean()  # log m - log p is -log Z for every token kept
    surprise = -(share * (best - log_mass).where(stays, 0.0)).sum(-1).mean()
    run.train()
    (metrics,) = metrics_of(run)
    bar = log_prob_bar(policy.model, TINY_MODEL, 0.9)
    assert metrics["objective/kl"] == pytest.approx(float(expected), abs=bar)
    assert metrics["objective/kl"] > 0.1
    assert metrics["objective/entropy"] == pytest.approx(float(surprise), abs=0.1)
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=2 * bar)
    assert metrics["policy/clipfrac_avg"] == 0.0
    assert metrics["rollout/log_prob_mismatch_max"] < bar


def test_the_gradient_is_that_of_the_truncated_policy():
    """The claim of ``LanguageAdvantages``: advantages of mean 0 under m make log p as good as log m."""
    torch.manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    keep = logits.detach().topk(4).indices
    reward, log_p = torch.randn(9, dtype=torch.float64)[keep], logits.log_softmax(-1)[keep]
    log_m = log_p - log_p.logsumexp(-1)
    m = log_m.detach().exp()
    log_ref = torch.randn(9, dtype=torch.float64).log_softmax(-1)[keep]
    utility = (log_m.exp() * (reward - 0.3 * (log_m - log_ref))).sum()
    (expected,) = torch.autograd.grad(utility, logits, retain_graph=True)
    paid = reward - 0.3 * (log_m.detach() - log_ref)
    advantage = paid - (m * paid).sum()
    (found,) = torch.autograd.grad((m * log_p * advantage).sum(), logits, retain_graph=True)
    torch.testing.assert_close(found, expected)
    (shifted,) = torch.autograd.grad((m * log_p * (advantage + 1)).sum(), logits, retain_graph=True)
    (mass,) = torch.autograd.grad(log_p.logsumexp(-1), logits)
    torch.testing.assert_close(shifted, expected + mass)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"stop_strings": ["a", ""]}, "--stop_strings holds an empty string"),
        ({"top_p": 0.0}, "--top_p must be positive"),
        ({"top_p": 1.5}, "--top_p must be between 0 and 1"),
        ({"top_k": -1}, "--top_k must not be negative"),
        ({"top_k": 5, "gap_steps": 2}, "--gap_steps certifies by samples of the whole policy"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"generation_batch_size": 0}, "--generation_batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(make_config, settings, line):
    with pytest.raises(UserError, match=line):
        make_config(**settings).check()


def test_a_certificate_is_not_taken_from_truncated_samples(tiny_model, tokenizer):
    policy = TokenPolicy.from_pretrained(tiny_model, tokenizer, max_new_tokens=2, top_k=3)
    prompts = encode_prompts(tokenizer, ["the film"] * 16)
    with pytest.raises(ValueError, match="leave out tokens that the certificate is about"):
        policy_certificate(policy, policy, lambda responses: responses, prompts, 4, 0.1)


def test_flags_by_the_names_of_transformers():
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--reward_funcs", "a:b"]
    given = ["--stop_strings", "User:", "\n\n", "--top_p", "0.9", "--top_k=50"]
    config = parse_config("ppo", "", PPOConfig, words + given)
    assert (config.stop_strings, config.top_p, config.top_k) == (["User:", "\n\n"], 0.9, 50)
    plain = parse_config("ppo", "", PPOConfig, words)
    assert (plain.stop_strings, plain.top_p, plain.top_k, plain.truncated) == ([], 1.0, 0, False)


@pytest.mark.parametrize(("settings", "trials"), [({}, 1), ({"use_peft": True, "lora_r": 2}, 0)])
def test_runs_of_adapters_sample_no_batch_that_nobody_reads(make_config, monkeypatch, settings, trials):
    calls, inside = [], LanguageRollouts.__init__
    forward = TokenPolicy.forward

    def watched(self, *args, **options):
        calls.append(len(args[0]))
        return forward(self, *args, **options)

    def build(self, *args, **options):
        monkeypatch.setattr(TokenPolicy, "forward", watched)
        inside(self, *args, **options)

    monkeypatch.setattr(LanguageRollouts, "__init__", build)
    run = PPORun(make_config(**settings))
    assert len(calls) == trials
    rollout = next(iter(run.rollouts))
    assert len(calls) == trials + 1
    assert rollout.batch_size == (8,)
    assert rollout["next", "reward"].shape == (8, 2)
    first = run.rollouts.prompts[rollout["prompt_index"]]
    assert torch.equal(first["prompt_tokens"], rollout["prompt_tokens"])
