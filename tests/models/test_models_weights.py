"""The weights of a policy by the names of a saved one: what an engine beside the trainer loads."""

import pytest
import torch
from architectures import SERVED, write
from engines import disturb
from safetensors.torch import load_file

from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_causal_lm, load_tokenizer
from torchrl_maxmin.models.lora import LoraSettings
from torchrl_maxmin.models.shared import SharedTrunk
from torchrl_maxmin.models.weights import weights_as_saved


@pytest.mark.parametrize("name", SERVED)
def test_names_and_values_are_those_of_a_saved_model(name, tokenizer, tmp_path):
    folder = write(name, tokenizer, tmp_path / "model")
    model = load_causal_lm(folder)
    saved, found = load_file(f"{folder}/model.safetensors"), weights_as_saved(model)
    assert saved.keys() <= found.keys()  # a file may leave out buffers that follow from the config
    for key, weight in saved.items():
        assert torch.equal(found[key], weight), key
    storages = [weight.untyped_storage().data_ptr() for weight in found.values() if weight.numel()]
    kept = [weight.untyped_storage().data_ptr() for weight in model.state_dict().values() if weight.numel()]
    if not any(".experts." in key for key in found):  # one tensor here, and many there
        assert set(storages) <= set(kept)


@pytest.mark.parametrize("kind", ["copies", "adapters"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_pushed_policy_is_the_policy_that_is_saved(name, kind, tokenizer, tmp_path):
    folder = write(name, tokenizer, tmp_path / "model")
    own = load_tokenizer(folder)
    policy = TokenPolicy.from_pretrained(folder, own, max_new_tokens=4)
    if kind == "copies":
        models = FullCopies(policy, own, 2)
    else:
        models = SharedTrunk(policy, own, 2, lora=LoraSettings(r=4, target_modules="all-linear"))
    disturb(models.parameters()["policy"])
    models.save(tmp_path / "saved")
    saved, before = (
        load_file(path / "model.safetensors") for path in (tmp_path / "saved", tmp_path / "model")
    )
    pushed = models.policy_weights()
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(pushed[key], weight) for key, weight in saved.items())
    assert any(not torch.equal(before[key], weight) for key, weight in saved.items())
    assert not any(weight.requires_grad for weight in pushed.values())
