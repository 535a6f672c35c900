"""4-bit weights: what is refused before any work, and, where bitsandbytes is, the three stages on them."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from architectures import write
from trainers_runs import PPORun
from transformers.utils.quantization_config import QuantizationMethod

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import load_causal_lm
from torchrl_maxmin.models.settings import ModelSettings
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.trainers import sft

FOUR = {"load_in_4bit": True, "use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return write("Llama", tokenizer, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [f"the film was {word} ." for word in ("great", "dull") * 4]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def present(monkeypatch):
    """As if bitsandbytes were there."""
    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: True)


@pytest.fixture
def bitsandbytes(monkeypatch):
    """The real one, without the layout of its own that some processors have for it."""
    found = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(found.nn.modules, "has_avx512bf16", lambda: False)


def test_it_is_refused_where_bitsandbytes_is_missing(make_config, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="pip install -U bitsandbytes"):
        make_config(**FOUR, merge_adapter=False).check()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"use_peft": False}, "goes with --use_peft"),
        ({"merge_adapter": True}, "--merge_adapter false"),
        ({"critic": "full"}, "give --critic adapter or heads"),
    ],
)
def test_it_is_refused_with(make_config, present, flags, words):
    settings = {"load_in_4bit": True, "use_peft": True, "merge_adapter": False}
    make_config(**settings).check()
    with pytest.raises(UserError, match=words):
        make_config(**settings | flags).check()


def test_the_trainer_of_transformers_sees_the_adapters(base, rows, present, monkeypatch, tmp_path):
    """A model that says it is quantized, as transformers asks it; its weights are not."""

    def load(name, **options):
        assert options.pop("quantization_config").load_in_4bit
        model = load_causal_lm(name, **options)
        model.is_quantized, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
        model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
        return model

    monkeypatch.setattr(sft, "load_causal_lm", load)
    options = FOUR | {"max_steps": 2, "device": "cpu", "merge_adapter": False}
    sft.run_sft(sft.SFTConfig(base, rows, str(tmp_path / "sft"), **options))
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()


def test_sft_trains_adapters_on_4_bits(base, rows, bitsandbytes, tmp_path):
    options = FOUR | {"max_steps": 2, "device": "cpu", "merge_adapter": False}
    sft.run_sft(sft.SFTConfig(base, rows, str(tmp_path / "sft"), **options))
    whole = (load_causal_lm(name).model.layers[0].mlp.up_proj for name in (base, str(tmp_path / "sft")))
    before, after = (layer.weight for layer in whole)
    assert not torch.equal(after, before)


def test_a_mixture_on_4_bits_is_read_as_it_was_saved(base, bitsandbytes, tmp_path):
    options = ModelSettings(load_in_4bit=True, use_peft=True).load_options()
    mixture = RewardMixture.from_backbone(base, 2, use_peft=True, lora_r=2, **options)
    with torch.no_grad():
        for parameter in mixture.trunk_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixture.save_pretrained(tmp_path)
    again = RewardMixture.from_pretrained(tmp_path)
    texts = ["the film", "a story"], ["was great .", "was dull ."]
    assert torch.uint8 in {parameter.dtype for parameter in again.model.parameters()}
    assert torch.equal(again.score(*texts), mixture.score(*texts))


def test_ppo_reads_a_reward_on_the_same_4_bits_from_its_trunk(base, bitsandbytes, make_config, tmp_path):
    options = ModelSettings(load_in_4bit=True, use_peft=True).load_options()
    for name, more in (("four", options), ("whole", {})):
        RewardMixture.from_backbone(base, 2, use_peft=True, lora_r=2, **more).save_pretrained(tmp_path / name)
    settings = FOUR | {"model_name_or_path": base, "merge_adapter": False, "num_iterations": 1}

    def left(run, name, **flags):
        flags |= {"reward_funcs": [], "reward_model_path": str(tmp_path / name)}
        trained = PPORun(make_config(run, **settings, **flags)).train()
        assert trained.policy.dtype == torch.bfloat16  # what 4-bit layers compute in
        own = trained.rollouts.rewards.source.mixture.model
        files = ("adapter_model.safetensors", "metrics.jsonl")
        return own is trained.models.adapted, [(trained.folder / file).read_bytes() for file in files]

    shared, outcome = left("shared", "four")
    assert shared
    assert left("own", "four", share_reward_trunk=False) == (False, outcome)
    assert not left("other", "whole")[0]  # whole weights are not those that were rounded
