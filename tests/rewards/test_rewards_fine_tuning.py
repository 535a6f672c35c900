"""The fine-tuning M-step: micro-batches change memory and nothing else."""

import pytest
import torch

from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import RewardMixture, fit_mixture
from torchrl_maxmin.rewards.fine_tuning import FineTuning, FineTuningSettings
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.world import sample_reviews

USERS, PAIRS = 6, 4


@pytest.fixture(scope="module")
def data():
    """Ragged texts of six users; some choices are ties, halved."""
    import datasets

    texts = [f"{prompt} {rest}" for prompt, rest in sample_reviews(2 * USERS * PAIRS, seed=1)]
    rows = [
        {
            "prompt": "",
            "response_a": texts[2 * i],
            "response_b": texts[2 * i + 1] + " and more" * (i % 5),
            "winner": ("a", "b", "tie")[i % 3],
            "user_id": i // PAIRS,
        }
        for i in range(USERS * PAIRS)
    ]
    return PreferenceDataset.load(datasets.Dataset.from_list(rows), ties="halve")


def gradients(mixture, data, responsibilities, micro_batch_size):
    """Gradients and loss of the whole data as one mini-batch."""
    pairs = PairTokens(data, mixture.encoder(None), mixture.reader.pad_id)
    settings = FineTuningSettings(batch_size=len(pairs), micro_batch_size=micro_batch_size, reward_l2=0.3)
    mixture.zero_grad()
    loss = FineTuning(mixture, pairs, settings).backward(list(range(len(pairs))), responsibilities)
    return [parameter.grad.clone() for parameter in mixture.parameters()], loss


def oracle(mixture, data, responsibilities):
    """The weighted loss and its penalty, one unpadded text at a time, divided once by all pairs."""
    total = nll = 0.0
    mixture.zero_grad()
    for prompt, *sides, user, weight in zip(
        data.prompts, data.chosen, data.rejected, data.row_users.tolist(), data.weights.tolist(), strict=True
    ):
        chosen, rejected = (
            mixture(torch.tensor(rows), torch.ones(1, len(rows[0]), dtype=torch.bool))[0]
            for rows in (mixture.reader.encode([prompt], [side]) for side in sides)
        )
        share = weight * responsibilities[user]
        loss = (share * torch.log1p(torch.exp(rejected - chosen))).sum()
        nll += loss / len(data)
        total += (loss + 0.3 * (share * (chosen**2 + rejected**2)).sum() / 2) / len(data)
    total.backward()
    return [parameter.grad.clone() for parameter in mixture.parameters()], nll.item()


@pytest.mark.parametrize("options", [{"head": "mlp"}, {}], ids=["mlp heads", "linear heads"])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 7, None])
def test_gradients_are_those_of_the_whole_batch(data, tiny_model, micro_batch_size, options, monkeypatch):
    """In float64, three groups, ragged texts, ties that count one half."""
    torch.manual_seed(0)
    mixture = RewardMixture.from_backbone(tiny_model, 3, **options).double()
    if mixture.heads is not None:  # heads compute in fp32 whatever they are given
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    generator = torch.Generator().manual_seed(0)
    responsibilities = torch.rand(USERS, 3, generator=generator, dtype=torch.float64).softmax(-1)
    found, loss = gradients(mixture, data, responsibilities, micro_batch_size)
    expected, nll = oracle(mixture, data, responsibilities)
    assert loss == pytest.approx(nll, rel=1e-12)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert max(gradient.abs().max().item() for gradient in expected) > 1e-3


def test_a_run_by_micro_batches_ends_where_the_whole_batch_does(data, tiny_model):
    settings = {"num_groups": 2, "num_rounds": 2, "steps_per_round": 3, "batch_size": 14, "num_restarts": 1}
    whole = fit_mixture(data, tiny_model, **settings)
    parts = fit_mixture(data, tiny_model, micro_batch_size=3, scoring_batch_size=2, **settings)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(parts.responsibilities_matrix, whole.responsibilities_matrix, **close)
    losses = [[record["loss"] for record in fit.history] for fit in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_memory_holds_a_micro_batch(data, tiny_model, monkeypatch):
    """No more texts than two a pair of a micro-batch, or a scoring batch, reach the model at once."""
    sizes = []
    forward = RewardMixture.forward

    def watched(self, tokens, *rest, **named):
        sizes.append((torch.is_grad_enabled(), len(tokens)))
        return forward(self, tokens, *rest, **named)

    monkeypatch.setattr(RewardMixture, "forward", watched)
    fit_mixture(
        data, tiny_model, 2, num_rounds=1, steps_per_round=2, batch_size=10, micro_batch_size=4,
        scoring_batch_size=6, num_restarts=1,
    )  # fmt: skip
    assert [size for training, size in sizes if training] == [8, 8, 4] * 2
    assert max(size for training, size in sizes if not training) == 6
