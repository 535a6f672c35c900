"""Responses by workers: whose weights, which prompts, and which numbers draw them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts_fakes import FakeWorkers
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.models.making import make_sampler
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.models.settings import ModelSettings
from torchrl_maxmin.models.shared import SharedTrunk
from torchrl_maxmin.rollouts.language import CalibratedRewards
from torchrl_maxmin.rollouts.language_workers import LanguageSampler, WorkerLanguageRollouts, numbers_of
from torchrl_maxmin.world import sample_prompts


@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 10**6))
def test_numbers_are_those_of_the_batch_alone(seed, index):
    numbers = numbers_of(seed, index, (4, 6))
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert torch.equal(numbers, numbers_of(seed, index, (4, 6)))
    for other in (numbers_of(seed, index + 1, (4, 6)), numbers_of(seed + 1, index, (4, 6))):
        assert not torch.isclose(numbers, other).any(-1).all()


def load_policy(folder, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return TokenPolicy(model, max_new_tokens=6, **ends, **options), tokenizer


class Constant:
    """A source of rewards that gives every response its length."""

    num_groups = 2

    def __call__(self, responses):
        length = responses["action_mask"].sum(-1, keepdim=True).float()
        return torch.cat([length, -length], -1)


def rollouts_of(models, tokenizer, folder, num_workers, path, settings=None, **options):
    samplers = [
        LanguageSampler(make_sampler(settings or ModelSettings(), load_policy(folder)[0], tokenizer))
        for _ in range(num_workers)
    ]
    prompts = encode_prompts(tokenizer, sample_prompts(12, 0, heldout=False))
    rewards = CalibratedRewards(Constant(), ends=models.policy.ends, folder=path)
    options = {"batch_size": 8, "num_batches": 3, "num_generations": 2, "seed": 3} | options
    return WorkerLanguageRollouts(models, FakeWorkers(samplers), rewards, prompts, **options)


def moved(models):
    """The networks after an update of a kind."""
    with torch.no_grad():
        for place, parameter in enumerate(models.parameters()["policy"]):
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
            )
    return models


def test_the_number_of_workers_changes_nothing(tiny_model, tmp_path):
    reference, tokenizer = load_policy(tiny_model)
    models = moved(FullCopies(reference, tokenizer, 0))
    found = [
        [batch.clone() for batch in rollouts_of(models, tokenizer, tiny_model, size, tmp_path)]
        for size in (1, 2, 3)
    ]
    for index, (one, *others) in enumerate(zip(*found, strict=True)):
        local = one.select("prompt_tokens", "prompt_mask")
        local["drawn_by"] = numbers_of(3, index, (8, 6))
        for other in (models.policy(local), *others):
            assert torch.equal(one["action"], other["action"])
            torch.testing.assert_close(one["sample_log_prob"], other["sample_log_prob"], atol=1e-5, rtol=1e-5)
        # numbers of rows differ, also those of one prompt
        assert len(one["action"].unique(dim=0)) > 4
        assert torch.equal(one["prompt_index"][0::2], one["prompt_index"][1::2])
        length = one["action_mask"].sum(-1).float()
        paid = one["next", "reward"] + 0.0
        assert torch.equal(paid[:, 0] - paid[:, 1], 2 * length)


@pytest.mark.parametrize("use_peft", [False, True])
def test_workers_sample_by_the_weights_of_the_trainer(tiny_model, tmp_path, use_peft):
    reference, tokenizer = load_policy(tiny_model)
    settings = ModelSettings(use_peft=use_peft, lora_r=4)
    first = {name: weight.clone() for name, weight in reference.model.state_dict().items()}
    if use_peft:
        models = SharedTrunk(reference, tokenizer, 0, lora=settings.lora_settings())
    else:
        models = FullCopies(reference, tokenizer, 0)
    count = sum(weight.numel() for weight in models.policy_parameters())
    assert (count < sum(weight.numel() for weight in first.values()) / 2) == use_peft  # adapters alone
    rollouts = rollouts_of(moved(models), tokenizer, tiny_model, 2, tmp_path, settings)
    batch = next(iter(rollouts))
    scored = models.log_prob(batch)
    torch.testing.assert_close(scored, batch["sample_log_prob"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(models.ref_log_prob(batch), scored, atol=1e-2)
    (worker, other) = (sampler.models for sampler in rollouts.workers.samplers)
    assert worker.policy.model is not other.policy.model
    assert len(worker.parameters()["policy"]) == len(models.parameters()["policy"])


def test_the_order_of_prompts_is_that_of_the_trainer_alone(tiny_model, tmp_path):
    reference, tokenizer = load_policy(tiny_model)
    models = FullCopies(reference, tokenizer, 0)
    rollouts = rollouts_of(models, tokenizer, tiny_model, 2, tmp_path, max_staleness=1)
    seen = torch.cat([batch["prompt_index"][::2] for batch in rollouts])
    assert sorted(seen.tolist()) == list(range(12))  # each prompt once, before any twice
    rollouts.close()
    assert rollouts.workers.closed
