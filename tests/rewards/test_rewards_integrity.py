"""Reward folders with missing, foreign or NaN weights are one line, in every form of mixture."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.rewards import RewardMixture, load_reward_model

FORMS = {
    "classifier": {},
    "heads": {"head": "mlp"},
    "adapters": {"use_peft": True, "lora_r": 2, "head": "low_rank"},
}
HEADS = {"classifier": "model.safetensors", "heads": "heads.safetensors", "adapters": "heads.safetensors"}


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name, options in FORMS.items():
        torch.manual_seed(0)
        RewardMixture.from_backbone(tiny_model, 2, **options).save_pretrained(root / name)
    return root


def change(path, key, value=None):
    """Write a file of tensors anew, with one more or one less; returns what it was."""
    before = path.read_bytes()
    tensors = load_file(path)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return before


def refused(folder):
    with pytest.raises(UserError) as raised:
        load_reward_model(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_part_is_whole(saved, tmp_path, form):
    folder = shutil.copytree(saved / form, tmp_path / "reward")
    load_reward_model(folder)
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == {"classifier": 1, "heads": 2, "adapters": 4}[form]
    for path in files:
        first = min(load_file(path))
        before = change(path, first)
        line = refused(folder)
        assert first.removeprefix("transformer.").split(".lora_")[0].split(".")[-1] in line, path
        path.write_bytes(before)
        change(path, "h.9.ln_1.bias", torch.zeros(4))
        refused(folder)
        path.write_bytes(before)
        poisoned = load_file(path)[first]
        poisoned.view(-1)[0] = float("inf")
        change(path, first, poisoned)
        assert "hold NaN or infinity" in refused(folder)
        path.write_bytes(before[:-9])
        assert str(path) in refused(folder)
        path.write_bytes(before)
    load_reward_model(folder)


@pytest.mark.parametrize("form", FORMS)
def test_heads_of_another_size_are_refused(saved, tmp_path, form):
    folder = shutil.copytree(saved / form, tmp_path / "reward")
    path = folder / HEADS[form]
    name = "score.weight" if form == "classifier" else "output.weight"
    change(path, name, torch.zeros(2, 5))
    refused(folder)


def test_an_adapter_of_another_trunk_is_refused(saved, tmp_path, make_model):
    folder = shutil.copytree(saved / "adapters", tmp_path / "reward")
    state = json.loads((folder / "mixture.json").read_text())
    other = make_model("narrow", n_embd=8)
    state["heads"]["base"] = other
    (folder / "mixture.json").write_text(json.dumps(state))
    assert str(folder) in refused(folder)
