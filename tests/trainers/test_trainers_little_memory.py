"""Where memory does not suffice, fine-tuning goes on with half the rows at once, to the same gradients."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.rewards.fine_tuning import FineTuning, FineTuningSettings
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world.world import sample_reviews

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def fine_tune(tiny_model, tmp_path, monkeypatch):
    """Fine-tune on six texts at once, in memory for fewer; returns the weights, and rows of every pass."""
    rows = [{"prompt": p, "completion": c} for p, c in sample_reviews(6, 0)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = []

    def run(name, most, error=NO_MEMORY, **settings):
        forward = GPT2LMHeadModel.forward

        def fail(model, input_ids=None, **options):
            calls.append(len(input_ids))
            if len(input_ids) > most:
                raise error
            return forward(model, input_ids=input_ids, **options)

        calls.clear()
        flags = {"max_steps": 3, "per_device_train_batch_size": 6, "device": "cpu", **settings}
        config = SFTConfig(tiny_model, str(tmp_path / "texts.jsonl"), str(tmp_path / name), **flags)
        with monkeypatch.context() as patch:
            patch.setattr(GPT2LMHeadModel, "forward", fail)
            run_sft(config)
        return load_file(tmp_path / name / "model.safetensors"), [size for size in calls if size > 1]

    return run


def test_where_memory_does_not_suffice_sft_goes_on_with_half(fine_tune, capsys):
    expected, _ = fine_tune("whole", 6)
    capsys.readouterr()
    found, calls = fine_tune("parts", 3)
    assert calls == [6, 3, 3, 3, 3, 3, 3]
    assert (
        capsys.readouterr().err.count("does not suffice for 6 rows at once; the update goes on with 3") == 1
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)
    with pytest.raises(torch.OutOfMemoryError):  # once in a run
        fine_tune("less", 2)


def test_fine_tuning_rewards_goes_on_with_half(tiny_model, tmp_path, capsys):
    """And it stays so where the M-step goes on."""
    rows = [
        {"prompt": p, "chosen": c, "rejected": c.split()[0], "user_id": f"u{i % 3}"}
        for i, (p, c) in enumerate(sample_reviews(6, 0))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceDataset.load(tmp_path / "pairs.jsonl")

    def tuned(most):
        torch.manual_seed(0)
        mixture = RewardMixture.from_backbone(tiny_model, 2)
        pairs = PairTokens(data, mixture.encoder(None), mixture.reader.pad_id)
        tuning, sizes = FineTuning(mixture, pairs, FineTuningSettings(batch_size=6)), []
        scores = pairs.scores

        def fail(mixture, rows):
            sizes.append(len(rows))
            if len(rows) > most:
                raise NO_MEMORY
            return scores(mixture, rows)

        pairs.scores = fail
        found = tuning.accumulate(list(range(6)), torch.full((3, 2), 0.5))
        return tuning, sizes, found, [p.grad.clone() for p in mixture.parameters()]

    _, _, expected, whole = tuned(6)
    tuning, sizes, found, parts = tuned(3)
    assert sizes == [6, 3, 3]
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert "the update goes on with 3" in capsys.readouterr().err
    again, _, _, _ = tuned(6)
    again.load_state_dict(tuning.state_dict())
    assert again.micro_batch.size == 3
