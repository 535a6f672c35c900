"""Reward mixtures on a policy's own trunk: the rewards of the whole model, no second trunk, nothing leaks."""

import json
import shutil

import pytest
import torch
from architectures import write
from tensordict import TensorDict

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_causal_lm
from torchrl_maxmin.models.lora import LoraSettings
from torchrl_maxmin.models.sequences import backbone_of
from torchrl_maxmin.models.shared import SharedTrunk
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.rewards.on_trunk import SavedMixture

NAMES = ("GPT-2", "Llama", "Qwen3", "Gemma2 (soft cap)")
LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
FORMS = {
    "an adapter a group": LORA,
    "one adapter": LORA | {"adapters": "shared", "head": "low_rank"},
    "other layers": {"use_peft": True, "lora_r": 2, "lora_dropout": 0.5},
    "heads alone": {"head": "mlp"},
    "classifier": {},
}
TEXTS = ["the film", "we loved", "a story"], ["was great .", "was dull .", "of the sea , twice ."]


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Folders of a base and of a mixture on it, whose adapters and heads are no longer neutral."""
    made = {}

    def make(name, form, dtype=torch.float32):
        key = (name, form, dtype)
        if key not in made:
            root = tmp_path_factory.mktemp("saved")
            base = write(name, tokenizer, root / "base")
            mixture = RewardMixture.from_backbone(base, 3, dtype=dtype, **FORMS[form])
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for path, parameter in mixture.named_parameters():
                    if ".lora_" in path or path.startswith("heads"):
                        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            mixture.log_prior.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
            mixture.save_pretrained(root / "reward")
            made[key] = base, root / "reward"
        return made[key]

    return make


def make_networks(base, critic="adapter", dtype=torch.float32, dropout=0.0, **options):
    model = load_causal_lm(str(base), dtype=dtype)
    reference = TokenPolicy(model, eos_token_id=2, pad_token_id=0, max_new_tokens=6)
    torch.manual_seed(3)
    lora = LoraSettings(r=4, alpha=8, dropout=dropout, target_modules="all-linear")
    networks = SharedTrunk(reference, None, 3, lora=lora, critic=critic, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameters in networks.parameters().values():
            for parameter in parameters:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return networks


def share(folder, base, tokenizer, dtype=torch.float32, **options):
    mixture = SavedMixture.find(folder)
    assert mixture.difference(load_causal_lm(str(base), dtype=dtype), tokenizer) is None
    networks = make_networks(base, dtype=dtype, **options)
    return mixture.on(networks), networks


def make_tokens(vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary + 2, (5, 9), generator=generator)  # some have no row
    lengths = torch.tensor([9, 4, 1, 7, 9])
    return tokens, torch.arange(9) >= 9 - lengths[:, None]


def make_rows(networks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = networks.policy.model.get_input_embeddings().num_embeddings
    return TensorDict(
        {
            "prompt_tokens": torch.randint(3, vocabulary, (4, 5), generator=generator),
            "prompt_mask": torch.arange(5) >= torch.tensor([[2], [0], [3], [0]]),
            "action": torch.randint(3, vocabulary, (4, 6), generator=generator),
            "action_mask": torch.arange(6) < torch.tensor([[6], [2], [4], [1]]),
        },
        [4],
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_those_of_the_model_loaded_whole(saved, tokenizer, name, form):
    base, folder = saved(name, form)
    whole = RewardMixture.from_pretrained(folder)
    mixture, _ = share(folder, base, tokenizer)
    tokens, mask = make_tokens(whole.num_tokens)
    with torch.no_grad():
        expected = whole(tokens, mask)
        assert expected.std(0).min() > 1e-3
        assert torch.equal(mixture(tokens, mask), expected)
    assert torch.equal(mixture.score(*TEXTS, calibrated=True), whole.score(*TEXTS, calibrated=True))
    assert torch.equal(mixture.log_prior, whole.log_prior)
    assert mixture.reads_tokens_of(tokenizer)


def reread(folder, dtype, tmp_path):
    """The mixture of a folder with its trunk in another dtype."""
    shutil.copytree(folder, tmp_path / "reread")
    path = tmp_path / "reread" / "mixture.json"
    state = json.loads(path.read_text())
    state["heads"]["dtype"] = dtype
    path.write_text(json.dumps(state))
    return RewardMixture.from_pretrained(tmp_path / "reread")


@pytest.mark.parametrize("form", ["an adapter a group", "heads alone"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_trunk_gives_the_rewards_in_bfloat16(saved, tokenizer, name, form, tmp_path):
    base, folder = saved(name, form)  # saved in float32
    mixture, _ = share(folder, base, tokenizer, dtype=torch.bfloat16)
    tokens, mask = make_tokens(mixture.num_tokens)
    with torch.no_grad():
        found, exact = mixture(tokens, mask), RewardMixture.from_pretrained(folder)(tokens, mask)
        assert torch.equal(found, reread(folder, "bfloat16", tmp_path)(tokens, mask))
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean() <= 16 * 2**-8 * exact.abs().max()


def storages(*modules):
    """Bytes by storage of all parameters."""
    parameters = [p for module in modules for p in module.parameters()]
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}


@pytest.mark.parametrize("critic", ["adapter", "heads"])
@pytest.mark.parametrize("form", ["an adapter a group", "one adapter", "heads alone"])
@pytest.mark.parametrize("name", NAMES)
def test_there_is_one_trunk(saved, tokenizer, name, form, critic):
    base, folder = saved(name, form)
    mixture, networks = share(folder, base, tokenizer, critic=critic)
    own = [p for path, p in mixture.named_parameters() if ".lora_" in path or path.startswith("heads")]
    own += [p for parameters in networks.parameters().values() for p in parameters]
    added = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in own}
    held = storages(mixture, networks.adapted, networks.reference, networks.critic)
    assert sum(held.values()) == sum(storages(load_causal_lm(base)).values()) + sum(added.values())
    assert sum(storages(RewardMixture.from_pretrained(folder).model).values()) > sum(added.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["an adapter a group", "other layers", "heads alone"])
def test_scoring_between_the_passes_leaves_their_gradients_alone(saved, tokenizer, form, checkpointing):
    base, folder = saved("Llama", form)
    found = []
    for scored in (False, True):
        mixture, networks = share(folder, base, tokenizer, gradient_checkpointing=checkpointing)
        rows, tokens = make_rows(networks), make_tokens(mixture.num_tokens)
        loss = networks.policy.log_prob(rows).sum()
        if scored:
            assert not mixture(*tokens).requires_grad
        loss = loss + networks.critic(rows.copy())["state_value"].square().sum()
        if scored:
            mixture(*tokens)
        loss.backward()
        parameters = [p for each in networks.parameters().values() for p in each]
        assert all(p.grad is None for p in mixture.parameters() if all(p is not q for q in parameters))
        found.append([loss.detach(), *(p.grad for p in parameters)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("critic", ["adapter", "heads"])
def test_roles_are_what_they_are_without_the_rewards(saved, tokenizer, critic, tmp_path):
    base, folder = saved("GPT-2", "an adapter a group")
    plain = make_networks(base, critic)
    mixture, networks = share(folder, base, tokenizer, critic=critic)
    rows, tokens = make_rows(networks), make_tokens(mixture.num_tokens)
    for before in (True, False):
        assert torch.equal(networks.ref_log_prob(rows), plain.ref_log_prob(rows))
        assert torch.equal(networks.log_prob(rows), plain.log_prob(rows))
        assert torch.equal(networks.values(rows), plain.values(rows))
        sizes = {role: [p.shape for p in parameters] for role, parameters in networks.parameters().items()}
        assert sizes == {role: [p.shape for p in ps] for role, ps in plain.parameters().items()}
        if before:
            mixture(*tokens)
    rewards = mixture(*tokens)
    state = networks.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert state["adapters"].keys() == plain.state_dict()["adapters"].keys()
    with torch.no_grad():
        for parameter in (p for parameters in networks.parameters().values() for p in parameters):
            parameter.mul_(2)
    assert torch.equal(mixture(*tokens), rewards)
    networks.load_state_dict(state)
    for merge in (True, False):
        networks.merge = merge
        networks.policy.model.name_or_path = base
        networks.tokenizer = tokenizer
        networks.save(tmp_path / str(merge))
        assert not list((tmp_path / str(merge)).glob("reward_*"))
        policy = TokenPolicy(
            load_causal_lm(str(tmp_path / str(merge))), eos_token_id=2, pad_token_id=0, max_new_tokens=6
        )
        with torch.no_grad():
            torch.testing.assert_close(policy.log_prob(rows), plain.log_prob(rows), rtol=0, atol=1e-5)


def test_what_was_at_work_is_again_after_an_exception(saved, tokenizer):
    base, folder = saved("Llama", "an adapter a group")
    mixture, networks = share(folder, base, tokenizer)
    rows, tokens = make_rows(networks), make_tokens(mixture.num_tokens)
    expected = networks.log_prob(rows)
    trained = {role: len(parameters) for role, parameters in networks.parameters().items()}
    calls = []

    def fail_second(*_):
        calls.append(networks.switch.active)
        if len(calls) == 2:
            raise RuntimeError("stop")

    hook = backbone_of(networks.policy.model).register_forward_hook(fail_second)
    with pytest.raises(RuntimeError, match="stop"):
        mixture(*tokens)
    hook.remove()
    assert calls == ["reward_group_0", "reward_group_1"]
    assert networks.switch.active == "default"
    assert torch.equal(networks.log_prob(rows), expected)
    assert {role: len(parameters) for role, parameters in networks.parameters().items()} == trained


def test_the_policys_dropout_is_not_the_rewards(saved, tokenizer):
    base, folder = saved("GPT-2", "other layers")
    mixture, networks = share(folder, base, tokenizer, dropout=0.5)
    tokens = make_tokens(mixture.num_tokens)
    networks.policy.log_prob(make_rows(networks)).sum().backward()
    assert torch.equal(mixture(*tokens), RewardMixture.from_pretrained(folder)(*tokens))


# -- what is the same --------------------------------------------------------------------------------------


def difference(folder, model, tokenizer):
    return SavedMixture.find(folder).difference(model, tokenizer)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["one adapter", "heads alone", "classifier"])
def test_one_other_weight_is_another_trunk(saved, tokenizer, name, form):
    base, folder = saved(name, form)
    model = load_causal_lm(base)
    assert difference(folder, model, tokenizer) is None
    for path, parameter in backbone_of(model).named_parameters():
        value = parameter.flatten()[-1].item()
        with torch.no_grad():
            parameter.view(-1)[-1] = value + max(abs(value), 1.0) * 1e-6
        assert difference(folder, model, tokenizer) == f"{path} differs"
        with torch.no_grad():
            parameter.view(-1)[-1] = value
    assert difference(folder, model, tokenizer) is None


def test_names_say_nothing(saved, tokenizer, tmp_path):
    """A copy elsewhere is the same; another model under the mixture's own path is not."""
    base, folder = saved("Llama", "one adapter")
    shutil.copytree(base, tmp_path / "copy")
    assert difference(folder, load_causal_lm(str(tmp_path / "copy")), tokenizer) is None
    mixture = RewardMixture.from_backbone(str(tmp_path / "copy"), 2, **LORA)
    mixture.save_pretrained(tmp_path / "small", include_base=False)
    assert difference(tmp_path / "small", load_causal_lm(base), tokenizer) is None
    model = load_causal_lm(str(tmp_path / "copy"))
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "copy")
    assert difference(tmp_path / "small", load_causal_lm(base), tokenizer) == "norm.weight differs"
    shutil.rmtree(tmp_path / "copy")
    assert "no folder" in difference(tmp_path / "small", load_causal_lm(base), tokenizer)


def test_a_config_that_computes_otherwise_is_another_trunk(saved, tokenizer):
    base, folder = saved("Llama", "one adapter")
    model = load_causal_lm(base)
    model.config.rms_norm_eps *= 2
    assert difference(folder, model, tokenizer) == "rms_norm_eps of its config differs"


def test_half_precision_is_not_what_it_was_rounded_from(saved, tokenizer):
    base, folder = saved("Llama", "one adapter", torch.bfloat16)
    assert difference(folder, load_causal_lm(base, dtype=torch.bfloat16), tokenizer) is None
    assert "differs" in difference(folder, load_causal_lm(base), tokenizer)


def test_shards_are_read_one_by_one(saved, tokenizer, tmp_path):
    base, folder = saved("Llama", "heads alone")
    shutil.copytree(folder, tmp_path / "reward")
    whole = RewardMixture.from_pretrained(folder)
    (tmp_path / "reward" / "model.safetensors").unlink()
    whole.model.save_pretrained(tmp_path / "reward", max_shard_size="8KB")
    assert len(list((tmp_path / "reward").glob("model-*.safetensors"))) > 1
    assert difference(tmp_path / "reward", load_causal_lm(base), tokenizer) is None


def test_an_own_pad_token_has_a_row_of_its_own(tokenizer, tmp_path):
    """Policy and mixture each drew one for the token that they added; a sampled one has no meaning."""
    from transformers import AutoTokenizer

    from torchrl_maxmin.models.loading import load_tokenizer

    base = write("Llama", tokenizer, tmp_path / "base")
    bare = AutoTokenizer.from_pretrained(base)
    bare.pad_token = bare.eos_token
    bare.save_pretrained(base)
    mixture = RewardMixture.from_backbone(base, 2, **LORA)
    mixture.save_pretrained(tmp_path / "reward")
    own = load_tokenizer(base)
    policy = TokenPolicy.from_pretrained(base, own, max_new_tokens=4)
    assert difference(tmp_path / "reward", policy.model, own) is None
    other = load_tokenizer(base)
    other.pad_token = other.unk_token  # a token that texts hold
    assert own.pad_token_id == len(own) - 1
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[other.pad_token_id] += 1
    assert difference(tmp_path / "reward", policy.model, other) == "embed_tokens.weight differs"


def test_an_adapter_of_other_layers_is_refused(saved, tokenizer, tmp_path):
    base, folder = saved("Llama", "one adapter")
    shutil.copytree(folder, tmp_path / "reward")
    path = tmp_path / "reward" / "adapters" / "shared" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = ["q_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="weights that the model has no place for"):
        SavedMixture.find(tmp_path / "reward").on(make_networks(base))
    config["target_modules"] = ".*q_proj"
    path.write_text(json.dumps(config))
    assert "pattern" in difference(tmp_path / "reward", load_causal_lm(base), tokenizer)
    path.unlink()
    with pytest.raises(UserError, match="lacks the adapters shared"):
        SavedMixture.find(tmp_path / "reward")


def test_other_reward_models_are_none(saved, tmp_path):
    base, _ = saved("Llama", "one adapter")
    assert SavedMixture.find(base) is None
    assert SavedMixture.find(tmp_path / "nowhere") is None
