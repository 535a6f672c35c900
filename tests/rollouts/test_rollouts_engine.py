"""Responses by an engine: the policy's own distribution with the weights of the time, or one clear error."""

import pytest
import torch
from engines import CopyEngine, disturb, engine_parts
from hypothesis import given
from hypothesis import strategies as st

from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.models.lora import LoraSettings
from torchrl_maxmin.models.sequences import mask_after_eos
from torchrl_maxmin.models.shared import SharedTrunk
from torchrl_maxmin.rollouts.engine import EnginePolicy, Sample, pad_samples, row_seeds

FAR = 0.1  # nats a token, where weights have moved; what is equal is within float32's 1e-3


@pytest.fixture(params=["copies", "adapters"])
def networks(request, tokenizer):
    def make(policy):
        if request.param == "copies":
            return FullCopies(policy, tokenizer, 0)
        return SharedTrunk(policy, tokenizer, 0, lora=LoraSettings(r=4, target_modules="all-linear"))

    return make


@pytest.fixture
def parts(networks, tiny_model, tokenizer):
    return engine_parts(tiny_model, tokenizer, networks)


def made(parts, engine=CopyEngine, **options):
    models, prompts = parts
    return EnginePolicy(models, engine(models.policy, models.tokenizer), prompts, **options)


def test_responses_are_those_of_the_policy_after_every_update(parts):
    models, prompts = parts
    sampler = made(parts, seed=3, version=7)
    for version in (7, 8, 9):
        batch = sampler(prompts.clone())
        mask = batch["action_mask"]
        torch.testing.assert_close(batch["sample_log_prob"], models.log_prob(batch), atol=1e-4, rtol=0)
        assert torch.equal(mask, mask_after_eos(batch["action"], models.policy.ends) & mask)
        assert not batch["sample_log_prob"][~mask].any()
        assert (batch["action"][~mask] == models.policy.pad_token_id).all()
        assert batch["policy_version"].tolist() == [version, version]
        disturb(models.parameters()["policy"])
        assert sampler.measure_gap() > FAR  # until they are pushed
    sampler.push()
    assert sampler.gap < 1e-4
    assert sampler.engine.loads == 5


def test_sampling_moves_no_random_numbers_and_repeats_itself(parts):
    prompts = parts[1]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [made(parts, seed=3, version=version)(prompts.clone())["action"] for version in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    again = made(parts, seed=3)
    assert all(torch.equal(again(prompts.clone())["action"], action) for action in first)


class Stale(CopyEngine):
    """Forgets to take the second weights."""

    def load(self, weights):
        if self.loads < 1:
            super().load(weights)


class StaleHead(CopyEngine):
    """Answers from a copy of the first output layer, as a packed one does."""

    def load(self, weights):
        head = self.policy.model.lm_head.weight.detach().clone() if self.loads else None
        super().load(weights)
        if head is not None:
            self.policy.model.lm_head.weight = torch.nn.Parameter(head)


@pytest.mark.parametrize("engine", [Stale, StaleHead])
def test_an_engine_with_earlier_weights_is_found_out(engine, tiny_model, tokenizer):
    parts = engine_parts(tiny_model, tokenizer, lambda policy: FullCopies(policy, tokenizer, 0))
    sampler = made(parts, engine)
    disturb(parts[0].parameters()["policy"])
    with pytest.raises(EngineError, match=r"of one row are .* apart; float32 allows 0.001$"):
        sampler(parts[1].clone())
    assert sampler.gap > FAR


class Deaf(CopyEngine):
    """Takes no weights at all."""

    def load(self, weights):
        pass


class Broken(CopyEngine):
    """Its memory is full."""

    def generate(self, prompts, seeds, *, stop_early=True):
        raise torch.OutOfMemoryError("no 3 GiB left\nmore lines")


def test_an_engine_that_computes_another_model_is_refused_before_any_work(parts):
    with pytest.raises(UserError, match=r"does not compute the policy.*; use --rollout_engine generate"):
        made(parts, Deaf)


def test_what_an_engine_raises_is_one_line(parts):
    with pytest.raises(EngineError, match=r"engine sampled nothing \(OutOfMemoryError: no 3 GiB left\)$"):
        made(parts, Broken)(parts[1].clone())


class Short(CopyEngine):
    """Sees stop strings where there are none, and says how often it was asked to go on."""

    again = 0

    def generate(self, prompts, seeds, *, stop_early=True):
        samples = super().generate(prompts, seeds)
        if not stop_early:
            self.again += len(prompts)
            return samples
        return [Sample(sample.tokens[:2], sample.log_probs[:2]) for sample in samples]


def test_a_response_that_was_cut_where_the_policy_sees_no_end_goes_on(tiny_model, tokenizer):
    prompts = ["the film was", "it", "we loved it", "the"] * 3
    parts = engine_parts(
        tiny_model,
        tokenizer,
        lambda policy: FullCopies(policy, tokenizer, 0),
        prompts,
        stop_strings=[tokenizer.decode([20])],
    )
    whole, cut = made(parts), made(parts, Short)
    expected, found = whole(parts[1].clone()), cut(parts[1].clone())
    assert cut.engine.again > 0
    for key in ("action", "action_mask", "sample_log_prob"):
        assert torch.equal(found[key], expected[key]), key


def test_a_response_without_its_end_is_an_error(parts):
    with pytest.raises(EngineError, match="left 2 responses before their end"):
        made(parts, Short)(parts[1].clone())


def test_truncated_samples_come_with_the_whole_distribution(networks, tiny_model, tokenizer):
    models, prompts = engine_parts(tiny_model, tokenizer, networks, top_k=5, temperature=0.7)
    engine = CopyEngine(models.policy, tokenizer, top_k=5)
    batch = EnginePolicy(models, engine, prompts)(prompts.clone())
    torch.testing.assert_close(batch["whole_log_prob"], models.log_prob(batch))
    mask = batch["action_mask"]
    assert (batch["sample_log_prob"] > batch["whole_log_prob"] + 1e-3)[mask].all()


samples = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 0, width=32)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@given(samples, st.integers(5, 7))
def test_padded_samples_hold_each_token_once(rows, length):
    given_ = [Sample([t for t, _ in row], [p for _, p in row]) for row in rows]
    tokens, mask, log_probs = pad_samples(given_, length, 77)
    assert tokens.shape == mask.shape == log_probs.shape == (len(rows), length)
    for row, own, real, log_prob in zip(rows, tokens, mask, log_probs, strict=True):
        assert list(zip(own[real].tolist(), log_prob[real].tolist(), strict=True)) == row
        assert real.tolist() == [column < len(row) for column in range(length)]
        assert (own[~real] == 77).all()
        assert (log_prob[~real] == 0).all()


@pytest.mark.parametrize(
    ("tokens", "log_probs"), [([], []), ([1, 2, 3, 4], [-1.0] * 4), ([1, 2], [-1.0])], ids=str
)
def test_what_no_engine_may_give(tokens, log_probs):
    with pytest.raises(EngineError, match="the engine gave"):
        pad_samples([Sample(tokens, log_probs)], 3, 0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(1, 64))
def test_seeds_of_rows_are_those_of_their_batch(seed, batch, rows):
    seeds = row_seeds(seed, batch, rows)
    assert seeds == row_seeds(seed, batch, rows)
    assert all(0 <= value < 2**31 for value in seeds)
    assert seeds != row_seeds(seed, batch + 1, rows)
