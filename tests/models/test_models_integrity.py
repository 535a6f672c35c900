"""Weights that are missing, left over, damaged or NaN: one line that names them, before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import SERVED, write
from safetensors.torch import load_file, save_file

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.integrity import listed
from torchrl_maxmin.models.loading import load_causal_lm, load_classifier, load_trunk
from torchrl_maxmin.models.lora import LoraSettings, add_adapters, save_policy


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path, *, drop=(), add=(), nan=()):
    """Write a safetensors file anew with other tensors."""
    tensors = {key: value for key, value in load_file(path).items() if key not in drop}
    tensors |= {key: torch.zeros(2, 2) for key in add}
    for key in nan:
        tensors[key].view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


LOADERS = {"policy": load_causal_lm, "trunk": load_trunk}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_missing_weights_are_named_and_counted(folder, load):
    gone = [f"transformer.h.1.mlp.{name}" for name in ("c_fc.weight", "c_fc.bias", "c_proj.bias")]
    change(folder / "model.safetensors", drop=[*gone, "transformer.ln_f.weight"])
    with pytest.raises(UserError) as raised:
        load(str(folder))
    line = str(raised.value)
    assert "\n" not in line
    assert f"{folder} lacks 4 of the weights" in line
    assert "h.1.mlp.c_fc.bias" in line
    assert " and 1 more" in line


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_layer_too_many_is_refused(folder, load):
    """A config that names fewer layers than the file has gives a model that nobody trained."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(UserError, match=r"holds \d+ weights that its \w+ has no place for: .*h\.1\."):
        load(str(folder))


def test_another_size_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
    with pytest.raises(UserError, match=f"cannot read the model of {folder}"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_nan_weights_are_refused(folder, load):
    change(folder / "model.safetensors", nan=["transformer.wte.weight"])
    with pytest.raises(UserError, match=r"1 weights of .* hold NaN or infinity: .*wte.weight; the run"):
        load(str(folder))


def test_a_policy_takes_no_weights_of_others(folder):
    change(folder / "model.safetensors", add=["v_head.weight"])
    with pytest.raises(UserError, match=r"no place for: v_head\.weight"):
        load_causal_lm(str(folder))
    load_trunk(str(folder))  # which takes the files of any model around it


def test_what_old_files_hold_beside_the_weights_is_none_missing(folder):
    buffers = ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "transformer.position_ids"]
    change(folder / "model.safetensors", add=buffers)
    expected = load_causal_lm(str(folder)).state_dict()
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied
    change(folder / "model.safetensors", drop=buffers)
    found = load_causal_lm(str(folder)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", SERVED)
def test_every_architecture_is_whole(name, tokenizer, tmp_path):
    folder = write(name, tokenizer, tmp_path / "model")
    load_causal_lm(folder)
    load_trunk(folder)


def test_a_trunk_from_a_trunk_and_a_language_model_is_the_same(folder, tmp_path):
    trunk, tokenizer = load_trunk(str(folder))
    trunk.save_pretrained(tmp_path / "trunk")
    tokenizer.save_pretrained(tmp_path / "trunk")
    again, _ = load_trunk(str(tmp_path / "trunk"), alone=True)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in trunk.state_dict().items())
    change(tmp_path / "trunk" / "model.safetensors", add=["extra"])
    with pytest.raises(UserError, match="no place for: extra"):
        load_trunk(str(tmp_path / "trunk"), alone=True)


def test_damage_names_the_file(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[20] ^= 1 << 7
    long = bytearray(whole)
    long[5] ^= 1 << 3  # of the header's length
    for damaged in (whole[:-100], whole[:40], whole[:3], b"", bytes(flipped), bytes(long)):
        path.write_bytes(damaged)
        for load in (load_causal_lm, load_trunk):
            with pytest.raises(UserError) as raised:
                load(str(folder))
            assert str(path) in str(raised.value)
            assert "\n" not in str(raised.value)


def test_a_classifier_without_its_trunk_or_head_is_refused(folder, tmp_path):
    from transformers import GPT2ForSequenceClassification

    out = tmp_path / "classifier"
    GPT2ForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(out)
    path = out / "model.safetensors"
    whole = path.read_bytes()
    load_classifier(str(out))
    change(path, add=["lm_head.weight"])
    load_classifier(str(out))
    change(path, drop=["score.weight"])
    with pytest.raises(UserError, match=r"holds no reward head \(score.weight missing\)"):
        load_classifier(str(out))
    path.write_bytes(whole)
    change(path, drop=["transformer.h.0.ln_1.bias"])
    with pytest.raises(UserError, match=r"lacks 1 of the weights .*transformer\.h\.0\.ln_1\.bias"):
        load_classifier(str(out))
    path.write_bytes(whole)
    change(path, add=["score.bias"])
    with pytest.raises(UserError, match=r"no place for: score\.bias"):
        load_classifier(str(out))


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """The folder of an adapter on the tiny model."""
    model = load_causal_lm(tiny_model)
    adapted = add_adapters(model, ["default"], LoraSettings(r=2), task_type="CAUSAL_LM")
    save_policy(model, adapted, tmp_path / "adapter", merge=False)
    return tmp_path / "adapter"


def test_adapters_are_whole_too(adapter, make_model):
    load_causal_lm(str(adapter))
    path = adapter / "adapter_model.safetensors"
    whole, first = path.read_bytes(), min(load_file(path))
    change(path, drop=[first])
    with pytest.raises(UserError, match=f"the adapter in {adapter} lacks 1 weights, which would be as new"):
        load_causal_lm(str(adapter))
    path.write_bytes(whole)
    change(path, add=[first.replace(".h.0.", ".h.7.")])
    with pytest.raises(UserError, match=r"holds 1 weights that the model has no place for: .*h\.7"):
        load_causal_lm(str(adapter))
    path.write_bytes(whole)
    change(path, nan=[first])
    with pytest.raises(UserError, match=f"1 weights of the adapter in {adapter} hold NaN"):
        load_causal_lm(str(adapter))
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=f"cannot read the adapter of .*{path} is damaged"):
        load_causal_lm(str(adapter))


@pytest.mark.parametrize("settings", [{"n_embd": 32}, {"n_layer": 1}])
def test_an_adapter_of_another_model_is_refused(adapter, make_model, settings):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": make_model("other", **settings)}))
    with pytest.raises(UserError, match="adapter") as raised:
        load_causal_lm(str(adapter))
    assert "\n" not in str(raised.value)


def test_few_names_are_listed_whole():
    assert listed(["b", "a"]) == "a, b"
    assert listed("edcba") == "a, b, c and 2 more"
