"""Several processes, each with some of the pairs, fit the linear mixture of all; no pair is sent."""

import json
import pickle
from collections import Counter

import pytest
import torch
from ranks import on_ranks

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.shares import AdamStepOfShares, SharedChoices
from torchrl_maxmin.core.distributed import process_group
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import fit_mixture
from torchrl_maxmin.rewards.pairs import feature_choices, own_offsets, own_rows, shared_feature_choices
from torchrl_maxmin.world import sample_reviews


def random_choices(num_pairs, num_users=5, weighted=True):
    """Pairs of users of two tastes, in float64."""
    generator = torch.Generator().manual_seed(num_pairs)
    users = torch.arange(num_pairs) % num_users
    x = torch.randn(num_pairs, 3, generator=generator, dtype=torch.float64)
    taste = torch.eye(3, dtype=torch.float64)[users.sort().values % 2]
    x = torch.where((x * taste).sum(-1, keepdim=True) > 0, x, -x)
    weights = torch.rand(num_pairs, generator=generator, dtype=torch.float64) if weighted else None
    return PairChoices(
        x, torch.cat([torch.zeros(1), users.bincount(minlength=num_users).cumsum(0)]).long(), weights
    )


def share_of(choices):
    own = own_rows(len(choices.differences))
    weights = None if choices.row_weights is None else choices.row_weights[own]
    return SharedChoices(choices.differences[own], own_offsets(choices.user_offsets, own), weights)


def figures(fit):
    """What a fit found, as lists: tensors do not outlive the process that sends them."""
    values = [*fit.weight.flatten(), *fit.log_prior, *fit.responsibilities.flatten()]
    return [*map(float, values), fit.log_likelihood, *fit.restart_scores]


def fit_shares(cases):
    with process_group("ddp"):
        return [
            figures(fit_choices(share_of(choices), 2, 0, m_step=AdamStepOfShares, assignment=assignment))
            for choices, assignment in cases
        ]


def test_shares_are_fitted_as_all_pairs_are():
    """Users lie with two or three processes, one of which may have no pair at all."""
    cases = [
        (random_choices(41), "soft"),
        (random_choices(41, weighted=False), "hard"),
        (random_choices(4, num_users=2), "soft"),
    ]
    wanted = [figures(fit_choices(choices, 2, 0, assignment=assignment)) for choices, assignment in cases]
    for found in on_ranks(3, fit_shares, cases):
        for one, other in zip(found, wanted, strict=True):
            assert one == pytest.approx(other, abs=1e-8)


@pytest.fixture(scope="module")
def write_pairs(tmp_path_factory):
    """Write pairs of six users; every seventh pair stands there twice."""

    def write(count):
        rows = []
        for i, (prompt, rest) in enumerate(sample_reviews(count, seed=2)):
            words = f"{prompt} {rest}".split()
            sides = [" ".join(words), " ".join(words[: len(words) // 2])][:: 1 if i % 6 < 3 else -1]
            row = {"prompt": "the film", "user_id": i % 6}
            rows.append(row | dict(zip(("chosen", "rejected"), sides, strict=True)))
            if i % 7 == 0:
                rows.append(rows[-1])
        path = tmp_path_factory.mktemp("pairs") / f"{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def read_shares(path, model):
    with process_group("ddp"):
        data = PreferenceDataset.load(path)
        own, every = (read(data, model, None, "cpu") for read in (shared_feature_choices, feature_choices))
        return own.differences.tolist(), own.user_offsets.tolist(), every.differences.tolist()


def test_features_stay_with_the_process_that_read_them(write_pairs, tiny_model):
    path = write_pairs(31)
    data = PreferenceDataset.load(path)
    wanted = feature_choices(data, tiny_model, None, "cpu")
    assert len(wanted.differences) < len(data)
    (one, some, every), (other, rest, again) = on_ranks(2, read_shares, path, tiny_model)
    assert 0 < len(one) < len(wanted.differences)
    for found in (one + other, every, again):
        torch.testing.assert_close(torch.tensor(found), wanted.differences, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.tensor(some) + torch.tensor(rest), wanted.user_offsets)


def sent_by_fits(paths, model):
    """What each fit sends: kinds and shapes of tensors, and the bytes of what is pickled."""
    import torch.distributed as dist

    tensors, pickled = Counter(), []

    def watched(name, of_tensor):
        function = getattr(dist, name)

        def call(*arguments, **options):
            sent = arguments[of_tensor]
            if "object" in name:
                pickled.append(len(pickle.dumps(sent)))
            else:
                tensors[name, tuple(sent.shape)] += 1
            return function(*arguments, **options)

        setattr(dist, name, call)

    for name, place in (("all_reduce", 0), ("broadcast", 0), ("all_gather", 1)):
        watched(name, place)
    for name, place in (("broadcast_object_list", 0), ("all_gather_object", 1)):
        watched(name, place)
    seen = []
    for path in paths:
        tensors.clear()
        pickled.clear()
        with process_group("ddp"):
            fit_mixture(PreferenceDataset.load(path), model, 2, num_rounds=3, steps_per_round=2, batch_size=8)
        seen.append((dict(tensors), list(pickled)))
    return seen


def test_what_is_sent_does_not_depend_on_the_number_of_pairs(write_pairs, tiny_model):
    """Sums by user, by head and by weight: a pair stays where it is, as features, margins or gradient."""
    for (few, little), (many, much) in on_ranks(
        2, sent_by_fits, [write_pairs(30), write_pairs(90)], tiny_model
    ):
        assert {kind for kind, _ in few} <= {"all_reduce", "broadcast"}
        assert many.keys() == few.keys()
        assert ("all_reduce", (6, 2)) in few
        for (kind, shape), count in few.items():
            if shape not in ((6, 2), (2, 48)):  # as many rounds as EM takes until it has converged
                assert many[kind, shape] == count
        # the groups that EM begins with, and seeds
        assert much == pytest.approx(little, abs=256)
