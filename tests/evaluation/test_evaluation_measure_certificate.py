"""The certificate of the evaluation stage, against the exact dual on tiny models."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from torchrl_maxmin.evaluation.measure import run_evaluate
from torchrl_maxmin.rewards import Calibration
from torchrl_maxmin.welfare import solve_dual
from torchrl_maxmin.world import sample_prompts


@pytest.fixture(scope="module")
def prompts():
    """As many as a certificate needs."""
    return sample_prompts(16, 0, heldout=True)


@pytest.mark.parametrize(
    ("ends", "noise"), [(7.0, 0.1), (14.0, 0.0)], ids=["its own taste", "ends more often"]
)
def test_the_certificate_holds_the_exact_gap(
    measure, trained, tiny_model, reward_folder, mixture, prompts, tokenizer, tmp_path, ends, noise
):
    """Responses of one token can all be enumerated: the exact dual is the judge."""
    beta, penalty = 1.5, 3.0
    calibration = Calibration("sft_mean", torch.tensor([-0.2, -1.2]), torch.tensor([0.4, 0.4]))
    policy = trained(missing_eos_penalty=penalty, kl_coef=beta, calibration=calibration.to_dict())
    reference = str(shutil.copytree(tiny_model, tmp_path / "reference"))
    for path, bias, deviation in ((reference, 7.0, 0.0), (policy, ends, noise)):  # both end often
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            model.transformer.ln_f.bias += bias * model.transformer.wte.weight[tokenizer.eos_token_id]
            for parameter in model.parameters():
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(path)
    found = measure(
        policies=[f"sft={reference}", f"maxmin={policy}"],
        reward_model_path=reward_folder,
        response_length=1,
        certificate_samples=2048,
        certificate_prompts=16,
    ).extra["certificate"]

    vocabulary = torch.arange(len(tokenizer))
    ended = (vocabulary == tokenizer.eos_token_id)[:, None]

    def every_response(prompt):
        """Rewards of all responses of one token, read as tokens: no end where there is none."""
        start = torch.tensor(tokenizer(prompt).input_ids).expand(len(vocabulary), -1)
        tokens = torch.cat([start, vocabulary[:, None]], 1)
        with torch.no_grad():
            return calibration.apply(mixture(tokens, torch.ones_like(tokens, dtype=torch.bool)))

    rewards = torch.stack([every_response(prompt) - penalty * ~ended for prompt in prompts]).double()
    tables = []
    for path in (policy, reference):
        model = AutoModelForCausalLM.from_pretrained(path).double().eval()
        with torch.no_grad():
            rows = [model(torch.tensor([tokenizer(p).input_ids])).logits[0, -1] for p in prompts]
        tables.append(torch.stack(rows).log_softmax(-1))
    log_policy, log_reference = tables

    def gap(rewards):
        kept = (rewards - beta * (log_policy - log_reference)[..., None]) * log_policy.exp()[..., None]
        return solve_dual(rewards, beta, log_weights=log_reference).value - kept.sum(1).mean(0).min().item()

    exact, as_a_bonus = gap(rewards), gap(rewards + 2 * penalty * ~ended)

    assert found["reason"] is None
    assert log_reference[:, tokenizer.eos_token_id].exp().mean() > 0.05
    assert exact > 0.1
    assert found["low"] <= exact <= found["high"]
    assert found["value"] == pytest.approx(exact, rel=0.03)
    if not noise:  # one that ends more often than the reference is nearer to the optimum if ends are missed
        assert found["value"] < as_a_bonus - 0.3


def test_a_policy_says_its_own_beta(measure, trained, tiny_model, reward_folder):
    policies = [f"sft={tiny_model}", f"maxmin={trained()}"]
    settings = {"policies": policies, "reward_model_path": reward_folder, "certificate_samples": 128}
    own = measure(name="own", **settings).extra["certificate"]
    given = measure(name="given", beta=1.0, **settings).extra["certificate"]
    other = measure(name="other", beta=3.0, **settings).extra["certificate"]
    assert own == given  # the coefficient that training ended with, not the one that it began with
    assert own["value"] != other["value"]
    assert "no response of reference mass below" in own["statement"]
    bounded = measure(name="bounded", reward_bound=40.0, **settings).extra["certificate"]
    assert bounded["high"] > own["high"]
    assert "no reward is above 40 in size" in bounded["statement"]
    exceeded = measure(name="exceeded", reward_bound=0.01, **settings).extra["certificate"]
    assert exceeded["high"] is None
    assert "above the given bound of 0.01" in exceeded["reason"]


def test_few_prompts_give_no_certificate(measure, trained, tiny_model, reward_folder):
    policies = [f"sft={tiny_model}", f"maxmin={trained()}"]
    found = measure(policies=policies, reward_model_path=reward_folder, certificate_prompts=6)
    assert found.extra["certificate"]["value"] is None
    assert "6 of them" in found.extra["certificate"]["reason"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kl_coef": 0.0}, "without a KL penalty"),
        ({"reward_funcs": ["measure_judges:words"]}, "maxmin was not trained on this reward mixture"),
        ({"calibration": Calibration.identity(3).to_dict()}, "maxmin was not trained on this reward mixture"),
        ({"kl_coef": 1e-3}, "effective sample size"),
    ],
)
def test_no_certificate_and_the_reason(measure, trained, tiny_model, reward_folder, settings, reason):
    policies = [f"sft={tiny_model}", f"maxmin={trained(**settings)}"]
    found = measure(policies=policies, reward_model_path=reward_folder).extra["certificate"]
    assert (found["value"], found["low"], found["high"]) == (None, None, None)
    assert reason in found["reason"]


def test_no_certificate_for_a_folder_that_says_nothing(make_config, reward_folder):
    folder = run_evaluate(make_config(reward_model_path=reward_folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["certificate"]["value"] is None
    assert "maxmin does not say how it was trained" in summary["certificate"]["reason"]


def test_no_certificate_for_a_policy_that_is_not_there(measure, reward_folder, tiny_model, other_model):
    policies = [f"sft={tiny_model}", f"best={other_model}"]
    found = measure(reward_model_path=reward_folder, policies=policies).extra["certificate"]
    assert found["value"] is None
    assert "no policy named 'maxmin'" in found["reason"]
    assert "--certify" in found["reason"]
