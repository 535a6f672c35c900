"""How much a reader of clustering goes through: the files between a jsonl file and responsibilities."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import maxmin_kernels
import pytest

import torchrl_maxmin
from torchrl_maxmin.clustering import PairChoices, fit_choices
from torchrl_maxmin.clustering.choices import row_weights_of
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import fit_mixture
from torchrl_maxmin.rewards.pairs import feature_differences
from torchrl_maxmin.world import sample_reviews

ROOTS = [Path(package.__file__).parent for package in (torchrl_maxmin, maxmin_kernels)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Twelve users with a few pairs each."""
    reviews = sample_reviews(96, seed=0)
    pairs = zip(reviews[::2], reviews[1::2], strict=True)
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": f"user-{i % 12}"}
        for i, ((prompt, chosen), (_, rejected)) in enumerate(pairs)
        if chosen != rejected
    ]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def files_of(function):
    """What a function returns, and our files {package: {file: names}} whose functions it calls."""
    seen = {root.name: defaultdict(set) for root in ROOTS}

    def profile(frame, event, _):
        file = Path(frame.f_code.co_filename)
        for root in ROOTS:
            if event == "call" and frame.f_code.co_name != "<module>" and file.is_relative_to(root):
                seen[root.name][file.relative_to(root).as_posix()].add(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(before)
    return result, seen


def listing(files):
    return "\n".join(f"{file}: {sorted(files[file])}" for file in sorted(files))


def test_from_a_file_to_responsibilities_on_features(path, tiny_model):
    def responsibilities():
        data = PreferenceDataset.load(path)
        differences = feature_differences(data, tiny_model, None, "cpu")
        choices = PairChoices(differences, data.user_offsets, row_weights_of(data))
        return fit_choices(choices, 2, seed=0).responsibilities

    responsibilities()  # what is imported on the way is no part of it
    found, seen = files_of(responsibilities)
    assert found.shape == (12, 2)
    ours, kernels = seen.values()
    assert {"preferences/dataset.py", "rewards/pairs.py", "clustering/em.py"} < set(ours)
    assert len(ours) <= 22, listing(ours)
    assert 0 < len(kernels) <= 6, listing(kernels)


def test_from_a_file_to_a_mixture_that_is_not_tuned(path, tiny_model):
    fit, seen = files_of(lambda: fit_mixture(PreferenceDataset.load(path), tiny_model, 2, num_rounds=0))
    assert fit.responsibilities_matrix.shape == (12, 2)
    ours, kernels = seen.values()
    assert {"rewards/fit.py", "rewards/mixture.py", "clustering/linear.py"} < set(ours)
    assert len(ours) <= 30, listing(ours)
    assert 0 < len(kernels) <= 6, listing(kernels)
