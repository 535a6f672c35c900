"""Every form of reward mixture: heads, encoders, LoRA adapters; the same scores everywhere."""

import json

import pytest
import torch
from architectures import write
from rewards_models import COMPLETIONS, PROMPTS, chat_tokenizer, save_decoder, save_encoder
from torch import nn
from transformers import AutoModel

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import load_config
from torchrl_maxmin.models.lora import LoraSettings, require_adaptable
from torchrl_maxmin.models.sequences import pad_left, pad_right
from torchrl_maxmin.rewards import Calibration, RewardMixture

LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 8}
FORMS = {
    "encoder": ("bert", {}),
    "encoder, mlp, cls": ("bert", {"head": "mlp", "pooling": "cls"}),
    "encoder, low rank": ("bert", {"head": "low_rank", "rank": 2}),
    "encoder, response": ("bert", {"layout": "response"}),
    "encoder, LoRA each": ("bert", LORA),
    "encoder, LoRA shared": ("bert", LORA | {"adapters": "shared", "head": "low_rank"}),
    "decoder": ("llama", {}),
    "decoder, mean": ("llama", {"pooling": "mean"}),
    "decoder, mlp": ("llama", {"head": "mlp"}),
    "decoder, low rank": ("llama", {"head": "low_rank", "rank": 2}),
    "decoder, chat": ("llama", {"layout": "chat"}),
    "decoder, LoRA each": ("llama", LORA),
    "decoder, LoRA each, mlp": ("llama", LORA | {"head": "mlp"}),
    "decoder, LoRA shared": ("llama", LORA | {"adapters": "shared"}),
    "GPT-2, LoRA each": ("gpt2", LORA),
    "pad is eos": ("pad is eos", {}),
    "pad is eos, LoRA each": ("pad is eos", LORA),
}
PER_GROUP = [name for name in FORMS if "LoRA each" in name]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {
        "bert": save_encoder(root / "bert"),
        "llama": save_decoder(root / "llama"),
        "gpt2": save_decoder(root / "gpt2", "gpt2"),
        "pad is eos": save_decoder(root / "pad", "llama", chat_tokenizer(pad_token="</s>")),
    }


@pytest.fixture(scope="module")
def forms(backbones):
    made = {}

    def form(name):
        if name not in made:
            made[name] = build(backbones, name)
        return made[name]

    return form


def build(backbones, name):
    backbone, options = FORMS[name]
    torch.manual_seed(0)
    mixture = RewardMixture.from_backbone(backbones[backbone], 3, **options)
    with torch.no_grad():
        for parameter_name, parameter in mixture.named_parameters():
            if "lora_B" in parameter_name:  # new adapters change nothing
                parameter.normal_(std=0.3)
    mixture.log_prior.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    mixture.calibration = Calibration.fit(2 * torch.randn(20, 4, 3) + 1)
    return mixture


@pytest.mark.parametrize("name", FORMS)
def test_scores_depend_on_neither_batch_nor_padding(forms, name):
    mixture = forms(name)
    alone = mixture.score(PROMPTS, COMPLETIONS, batch_size=1)
    assert alone.shape == (8, 3)
    assert alone.std(0).min() > 0.01
    many = mixture.score(PROMPTS[::-1] * 8, COMPLETIONS[::-1] * 8, batch_size=64)
    torch.testing.assert_close(many, alone.flip(0).repeat(8, 1), atol=1e-5, rtol=1e-5)
    rows = mixture.reader.encode(PROMPTS, COMPLETIONS)
    for pad in (pad_left, pad_right):
        with torch.no_grad():
            padded = mixture(*pad(rows, mixture.reader.pad_id))
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_save_and_load_are_identical(forms, name, tmp_path):
    mixture = forms(name)
    mixture.save_pretrained(tmp_path)
    again = RewardMixture.from_pretrained(tmp_path)
    for calibrated in (False, True):
        expected = mixture.score(PROMPTS, COMPLETIONS, calibrated=calibrated)
        assert torch.equal(again.score(PROMPTS, COMPLETIONS, calibrated=calibrated), expected)
    torch.testing.assert_close(again.log_prior, mixture.log_prior, atol=1e-6, rtol=0)
    assert again.calibration.method == "sft_std"
    assert not again.model.training
    trainable = [(n, p.shape) for n, p in mixture.named_parameters() if p.requires_grad]
    assert [(n, p.shape) for n, p in again.named_parameters() if p.requires_grad] == trainable
    if mixture.heads is not None:
        weights = AutoModel.from_pretrained(tmp_path).state_dict()  # the trunk, by transformers alone
        base = mixture.model.get_base_model() if mixture.adapters else mixture.model
        for key, value in base.state_dict().items():
            if ".lora_" not in key:
                assert torch.equal(weights[key.replace(".base_layer.", ".")], value), key


@pytest.mark.parametrize("name", ["encoder, LoRA each", "decoder, LoRA shared"])
def test_adapters_can_be_saved_without_their_base(forms, name, tmp_path):
    mixture = forms(name)
    mixture.save_pretrained(tmp_path, include_base=False)
    assert not (tmp_path / "model.safetensors").exists()
    again = RewardMixture.from_pretrained(tmp_path)
    assert torch.equal(again.score(PROMPTS, COMPLETIONS), mixture.score(PROMPTS, COMPLETIONS))


@pytest.mark.parametrize("name", FORMS)
def test_every_trained_weight_and_no_other_gets_a_gradient(forms, name):
    mixture = forms(name)
    mixture.zero_grad()
    tokens, mask = pad_right(mixture.reader.encode(PROMPTS, COMPLETIONS), mixture.reader.pad_id)
    mixture(tokens, mask).square().sum().backward()
    ours = mixture.trunk_parameters() + mixture.head_parameters()
    assert len({id(p) for p in ours}) == len(ours)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours if p.dim() > 1)
    others = [p for p in mixture.parameters() if all(p is not q for q in ours)]
    assert all(p.grad is None for p in others)
    assert len(others) > 0 if mixture.adapters else not any(p.requires_grad for p in others)


@pytest.mark.parametrize("name", PER_GROUP)
def test_gradients_of_a_group_reach_its_own_adapter_alone(forms, name):
    mixture = forms(name)
    tokens, mask = pad_right(mixture.reader.encode(PROMPTS, COMPLETIONS), mixture.reader.pad_id)
    for k in range(3):
        mixture.zero_grad()
        mixture(tokens, mask)[:, k].sum().backward()
        for parameter_name, parameter in mixture.named_parameters():
            if ".lora_" in parameter_name:
                moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
                assert moved == (f".group_{k}." in parameter_name), parameter_name


@pytest.mark.parametrize("name", PER_GROUP)
def test_adapters_add_their_low_rank_updates(forms, name, backbones):
    """Rewards equal those of K plain trunks whose weights were changed by hand."""
    mixture = forms(name)
    weights = dict(mixture.named_parameters())
    columns = []
    for k in range(3):
        plain = RewardMixture.from_backbone(
            backbones[FORMS[name][0]], 3, head=mixture.heads.kind, pooling=mixture.reader.pooling
        )
        trunk = getattr(plain.model, plain.model.base_model_prefix, plain.model)
        with torch.no_grad():
            for key, parameter in trunk.named_parameters():
                stem = f"model.base_model.model.{key.removesuffix('.weight')}"
                if f"{stem}.lora_A.group_{k}.weight" in weights:
                    b, a = (weights[f"{stem}.lora_{x}.group_{k}.weight"].double() for x in "BA")
                    update = (8 / 2) * (b @ a)
                    parameter += (update if update.shape == parameter.shape else update.T).float()
            vectors = plain._vectors(
                *pad_right(plain.reader.encode(PROMPTS, COMPLETIONS), plain.reader.pad_id)
            )
            columns.append(mixture.heads(vectors)[:, k])
    torch.testing.assert_close(
        torch.stack(columns, -1), mixture.score(PROMPTS, COMPLETIONS), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("name", ["decoder", "encoder, mlp, cls", "encoder, low rank", "decoder, LoRA each"])
def test_permuted_groups_permute_scores(backbones, name):
    mixture = build(backbones, name)
    raw, calibrated = (mixture.score(PROMPTS, COMPLETIONS, calibrated=c) for c in (False, True))
    prior = mixture.log_prior.clone()
    order = torch.tensor([2, 0, 1])
    mixture.permute_groups_(order)
    torch.testing.assert_close(mixture.score(PROMPTS, COMPLETIONS), raw[:, order], atol=1e-6, rtol=1e-6)
    found = mixture.score(PROMPTS, COMPLETIONS, calibrated=True)
    torch.testing.assert_close(found, calibrated[:, order], atol=1e-6, rtol=1e-6)
    assert torch.equal(mixture.log_prior, prior[order])


@pytest.mark.parametrize("name", ["decoder", "encoder, low rank", "decoder, LoRA each"])
def test_a_reset_group_starts_at_its_donor(backbones, name):
    mixture = build(backbones, name)
    before = mixture.score(PROMPTS, COMPLETIONS)
    mixture.reset_head_(2, donor=0, noise_scale=0.0)
    after = mixture.score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(after, before[:, [0, 1, 0]], atol=1e-6, rtol=1e-6)
    mixture.reset_head_(2, donor=0)
    noisy = mixture.score(PROMPTS, COMPLETIONS)
    assert torch.equal(noisy[:, :2], after[:, :2])
    assert 0 < (noisy[:, 2] - after[:, 0]).abs().max() < before[:, 0].abs().max()


def test_training_changes_adapters_and_keeps_the_base(backbones):
    mixture = build(backbones, "encoder, LoRA each")
    base = {n: p.detach().clone() for n, p in mixture.model.named_parameters() if ".lora_" not in n}
    before = mixture.score(PROMPTS, COMPLETIONS)
    optimizer = torch.optim.AdamW([*mixture.trunk_parameters(), *mixture.head_parameters()], lr=1e-2)
    tokens, mask = pad_right(mixture.reader.encode(PROMPTS, COMPLETIONS), mixture.reader.pad_id)
    wanted = torch.randn(8, 3)
    losses = []
    for _ in range(15):
        loss = (mixture(tokens, mask) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (mixture.score(PROMPTS, COMPLETIONS) - before).abs().min(0).values.max() > 1e-3
    for parameter_name, parameter in mixture.model.named_parameters():
        if parameter_name in base:
            assert torch.equal(parameter, base[parameter_name]), parameter_name


def test_training_mode_switches_the_adapters_dropout_alone(backbones):
    torch.manual_seed(0)
    mixture = RewardMixture.from_backbone(backbones["bert"], 2, use_peft=True, lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    dropouts = {n: m for n, m in mixture.named_modules() if isinstance(m, nn.Dropout)}
    working = set()

    def watch(name):
        return lambda module, *_: working.add(name) if module.training else None

    for name, module in dropouts.items():
        module.register_forward_hook(watch(name))
    tokens, mask = torch.randint(5, 20, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    mixture.train()
    assert not torch.equal(mixture(tokens, mask), mixture(tokens, mask))
    assert working == {n for n in dropouts if ".lora_dropout." in n}
    working.clear()
    mixture.eval()
    assert torch.equal(mixture(tokens, mask), mixture(tokens, mask))
    assert not working


@pytest.mark.parametrize("adapters", ["per_group", "shared"])
def test_new_adapters_change_nothing(backbones, adapters):
    torch.manual_seed(0)
    adapted = RewardMixture.from_backbone(backbones["bert"], 2, use_peft=True, adapters=adapters)
    plain = RewardMixture.from_backbone(backbones["bert"], 2)
    plain.heads.load_state_dict(adapted.heads.state_dict())
    torch.testing.assert_close(
        adapted.score(PROMPTS, COMPLETIONS), plain.score(PROMPTS, COMPLETIONS), atol=1e-6, rtol=1e-6
    )
    assert len(adapted.trunk_parameters()) == (
        16 if adapters == "per_group" else 8
    )  # 2 layers x (q, v) x (A, B)


def test_lora_target_modules(backbones):
    options = {"use_peft": True, "adapters": "shared"}
    every = RewardMixture.from_backbone(backbones["bert"], 2, lora_target_modules="all-linear", **options)
    dense = RewardMixture.from_backbone(backbones["bert"], 2, lora_target_modules=["dense"], **options)
    names = {n for n, _ in dense.named_parameters() if ".lora_A." in n}
    assert names
    assert all(".dense.lora_A." in n for n in names)
    assert len(every.trunk_parameters()) > 2 * len(names)
    listed = RewardMixture.from_backbone(backbones["bert"], 2, lora_target_modules=["all-linear"], **options)
    assert len(listed.trunk_parameters()) == len(every.trunk_parameters())
    with pytest.raises(UserError, match="lora_target_modules"):
        RewardMixture.from_backbone(backbones["bert"], 2, lora_target_modules=["nowhere"], **options)


def test_adapters_of_a_type_that_peft_knows_no_layers_of(tokenizer, tmp_path):
    """All its linear layers are adapted, saved and found again."""
    folder = write("Granite (scale)", tokenizer, tmp_path / "base")
    mixture = RewardMixture.from_backbone(folder, 2, use_peft=True, lora_r=2)
    adapted = {name.split(".")[-4] for name, _ in mixture.named_parameters() if ".lora_A.group_0" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for parameter in mixture.trunk_parameters():
        nn.init.normal_(parameter, std=0.3)
    mixture.save_pretrained(tmp_path / "saved")
    again = RewardMixture.from_pretrained(tmp_path / "saved")
    texts = ["the film", "a story"], ["was great .", "was dull ."]
    assert torch.equal(again.score(*texts), mixture.score(*texts))


@pytest.mark.parametrize("name", ["Mamba2", "Llama", "GPT-2", "Phi3"])
def test_adapters_are_tried_before_there_are_weights(name, tokenizer, tmp_path):
    folder = write(name, tokenizer, tmp_path)
    before = torch.get_rng_state()
    if name == "Mamba2":
        with pytest.raises(UserError, match="out_proj"):
            require_adaptable(load_config(folder), LoraSettings(2))
    else:
        require_adaptable(load_config(folder), LoraSettings(2))
        with pytest.raises(UserError, match="nowhere"):
            require_adaptable(load_config(folder), LoraSettings(2, target_modules=["nowhere"]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["decoder", "encoder, mlp, cls", "decoder, LoRA each"])
def test_half_precision_is_kept(backbones, name, tmp_path):
    backbone, options = FORMS[name]
    mixture = RewardMixture.from_backbone(backbones[backbone], 2, dtype=torch.bfloat16, **options)
    mixture.save_pretrained(tmp_path)
    again = RewardMixture.from_pretrained(tmp_path)
    scores = mixture.score(PROMPTS, COMPLETIONS)
    assert scores.dtype == torch.float32
    assert torch.equal(again.score(PROMPTS, COMPLETIONS), scores)
    assert again.model.dtype == torch.bfloat16


def test_conversations_are_scored_like_the_transcripts_of_preference_data(forms):
    for name in ("encoder", "decoder"):
        reward = forms(name).reward_fn(group=1)
        found = reward(
            prompts=[[{"role": "user", "content": "the film"}]] * 2,
            completions=[[{"role": "assistant", "content": text}] for text in ("was great", "awful")],
            completion_ids=[[1], [2]],
        )
        template = name == "decoder"  # the encoder's tokenizer has none: conversations become transcripts
        prompt = "<user> the film </s> \n<assistant> " if template else "\n\nHuman: the film\n\nAssistant:"
        assert found == reward([prompt] * 2, [" was great", " awful"])
        assert found[0] != found[1]


@pytest.mark.parametrize("name", ["encoder", "decoder, LoRA each"])
def test_reward_fn_of_a_group(forms, name):
    reward = forms(name).reward_fn(group=2)
    expected = forms(name).score(PROMPTS, COMPLETIONS, calibrated=True)[:, 2]
    torch.testing.assert_close(torch.tensor(reward(PROMPTS, COMPLETIONS)), expected)
    assert reward.__name__ == "group_2"


def test_reward_fn_refuses_groups_that_are_not_there(forms):
    for options in ({"group": 3}, {"group": -1}, {"weights": [0.5, 0.5]}):
        with pytest.raises(ValueError, match="3 groups"):
            forms("encoder").reward_fn(**options)


def test_texts_longer_than_the_positions(forms):
    for name in ("encoder", "decoder", "GPT-2, LoRA each"):
        mixture = forms(name)
        long = mixture.score(["the film was awful " * 20], ["it was great"])
        assert torch.isfinite(long).all()
    decoder = forms("decoder")
    end = decoder.score(["the film was awful " * 40], ["it was great"])
    torch.testing.assert_close(end, decoder.score(["awful " + "the film was awful " * 30], ["it was great"]))
    assert (end - decoder.score(["the film was awful " * 40], ["it was awful"])).abs().max() > 1e-2


@pytest.mark.parametrize("lost", ["heads.safetensors", "adapters/group_1/adapter_config.json"])
def test_a_folder_that_lost_its_heads_is_refused(forms, tmp_path, lost):
    forms("encoder, LoRA each").save_pretrained(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(UserError, match="lacks"):
        RewardMixture.from_pretrained(tmp_path)


def test_a_folder_of_the_first_format_is_read(forms, tmp_path):
    """Before there were other forms, mixture.json held weights and calibration alone."""
    mixture = forms("decoder")
    mixture.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "mixture.json").read_text())
    first = {key: state[key] for key in ("prior", "calibration")}
    (tmp_path / "mixture.json").write_text(json.dumps(first))
    again = RewardMixture.from_pretrained(tmp_path)
    expected = mixture.score(PROMPTS, COMPLETIONS, calibrated=True)
    assert torch.equal(again.score(PROMPTS, COMPLETIONS, calibrated=True), expected)


def test_without_peft_the_extra_is_named(backbones, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"torchrl-maxmin\[llm\]"):
        RewardMixture.from_backbone(backbones["bert"], 2, use_peft=True)
    assert RewardMixture.from_backbone(backbones["bert"], 2).num_groups == 2


def test_mistakes(backbones, forms, tmp_path):
    with pytest.raises(UserError, match="none of per_group, shared"):
        RewardMixture.from_backbone(backbones["bert"], 2, use_peft=True, adapters="each")
    with pytest.raises(UserError, match="none of linear"):
        RewardMixture.from_backbone(backbones["bert"], 2, head="deep")
    with pytest.raises(UserError, match="no model at"):
        RewardMixture.from_backbone("no/such-model", 2)
    encoder_classifier = save_encoder(tmp_path, num_labels=1)
    with pytest.raises(UserError, match=r"RewardEnsemble\.from_pretrained"):
        RewardMixture.from_pretrained(encoder_classifier)


def test_a_decoder_whose_classifiers_head_has_several_layers(tokenizer, tmp_path):
    """Heads of our own, then, as on a trunk that has no classifier."""
    mixture = RewardMixture.from_backbone(write("RoFormer", tokenizer, tmp_path / "base"), 2)
    assert mixture.heads is not None
    scores = mixture.score(["the film", "a story"], ["was great", "was dull ."])
    mixture.save_pretrained(tmp_path / "saved")
    again = RewardMixture.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.score(["the film", "a story"], ["was great", "was dull ."]), scores)
