"""One trunk with adapters: roles never leak, the reference is the model, saved is what was trained."""

import copy

import pytest
import torch
from architectures import build
from rounding import EPS
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_causal_lm
from torchrl_maxmin.models.lora import LoraSettings
from torchrl_maxmin.models.shared import SharedTrunk
from torchrl_maxmin.world import build_tokenizer

NAMES = ("GPT-2", "Llama", "Qwen3", "Gemma2 (soft cap)")
LORA = LoraSettings(r=4, alpha=8, target_modules="all-linear")


def make_policy(name, dtype=torch.float32):
    model = build(name, build_tokenizer()).to(dtype)
    return TokenPolicy(model, eos_token_id=2, pad_token_id=0, max_new_tokens=6)


def make_rows(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    lengths = torch.tensor([3, 5, 2, 5])
    columns = torch.arange(5)
    rows = {
        "prompt_tokens": torch.randint(3, vocabulary, (4, 5), generator=generator),
        "prompt_mask": columns >= 5 - lengths[:, None],
        "action": torch.randint(3, vocabulary, (4, 6), generator=generator),
        "action_mask": torch.arange(6) < torch.tensor([[6], [2], [4], [1]]),
    }
    return TensorDict(rows, [4])


def disturb(networks, seed=1):
    """Adapters and heads as training would leave them: no longer neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in networks.parameters().values():
            for parameter in parameters:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def shared(name, critic="adapter", dtype=torch.float32, **options):
    return SharedTrunk(make_policy(name, dtype), None, 3, lora=LORA, critic=critic, **options)


@pytest.mark.parametrize("critic", ["adapter", "heads", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_without_adapters_it_is_the_reference_to_the_bit(name, critic):
    plain = make_policy(name)
    rows = make_rows(plain)
    with torch.no_grad():
        expected = plain.log_prob(rows)
    networks = shared(name, critic)
    assert torch.equal(networks.log_prob(rows), expected)  # new adapters change nothing
    disturb(networks)
    assert torch.equal(networks.ref_log_prob(rows), expected)
    assert not torch.equal(networks.log_prob(rows), expected)
    torch.manual_seed(3)
    sampled = networks.reference(rows.select("prompt_tokens", "prompt_mask"))
    torch.manual_seed(3)
    assert torch.equal(sampled["action"], plain(rows.select("prompt_tokens", "prompt_mask"))["action"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("critic", ["adapter", "heads", "full"])
def test_roles_get_the_gradients_of_their_own_losses(critic, checkpointing):
    """Also where both backward passes come after both forward passes."""
    networks = shared("Llama", critic, gradient_checkpointing=checkpointing)
    disturb(networks)
    rows = make_rows(networks.policy)

    def gradients(loss):
        for parameters in networks.parameters().values():
            for parameter in parameters:
                parameter.grad = None
        loss.backward()
        return {
            role: [None if p.grad is None else p.grad.clone() for p in parameters]
            for role, parameters in networks.parameters().items()
        }

    policy = gradients(networks.policy.log_prob(rows).sum())
    assert all(g is None for g in policy["critic"])
    critic_alone = gradients(networks.critic(rows.copy())["state_value"].square().sum())
    assert all(g is None for g in critic_alone["policy"])
    assert all(g is not None for g in [*policy["policy"], *critic_alone["critic"]])
    together = gradients(
        networks.policy.log_prob(rows).sum() + networks.critic(rows.copy())["state_value"].square().sum()
    )
    for role, alone in (("policy", policy), ("critic", critic_alone)):
        for found, expected in zip(together[role], alone[role], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_adapters_weights_do_not_reach_the_others_outputs():
    networks = shared("GPT-2")
    disturb(networks)
    rows = make_rows(networks.policy)
    log_prob, values = networks.log_prob(rows), networks.values(rows)
    roles = networks.parameters()
    with torch.no_grad():
        for parameter in roles["critic"]:
            parameter.mul_(2)
    assert torch.equal(networks.log_prob(rows), log_prob)
    moved = networks.values(rows)
    assert not torch.equal(moved, values)
    with torch.no_grad():
        for parameter in roles["policy"]:
            parameter.mul_(2)
    assert torch.equal(networks.values(rows), moved)
    assert not torch.equal(networks.log_prob(rows), log_prob)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_leave_loss_and_gradient_alone(name):
    results = []
    for checkpointing in (False, True):
        networks = shared(name, gradient_checkpointing=checkpointing)
        disturb(networks)
        rows = make_rows(networks.policy)
        loss = (
            networks.policy.log_prob(rows).sum() + networks.critic(rows.copy())["state_value"].square().sum()
        )
        loss.backward()
        results.append((loss.detach(), [p.grad for ps in networks.parameters().values() for p in ps]))
    (loss, gradients), (loss_again, gradients_again) = results
    torch.testing.assert_close(loss_again, loss, rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients_again, gradients, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=256 * EPS * max(scale, 1e-3))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_leave_the_loss_alone_within_their_rounding(name):
    networks = shared(name)
    disturb(networks)
    half = shared(name, dtype=torch.bfloat16)
    disturb(half)
    assert {p.dtype for ps in half.parameters().values() for p in ps} == {torch.float32}
    rows = make_rows(networks.policy)
    expected, found = networks.log_prob(rows), half.log_prob(rows)
    assert found.dtype == torch.float32
    largest = expected[rows["action_mask"]].abs().max()
    assert (found - expected)[rows["action_mask"]].abs().mean() <= 16 * 2**-8 * largest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("merge", [True, False])
def test_a_saved_policy_is_the_trained_one(name, merge, tmp_path, tokenizer):
    base, folder = tmp_path / "base", tmp_path / "policy"
    build(name, tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    reference = TokenPolicy(load_causal_lm(str(base)), eos_token_id=2, pad_token_id=0, max_new_tokens=6)
    networks = SharedTrunk(reference, tokenizer, 3, lora=LORA, merge=merge)
    disturb(networks)
    rows = make_rows(networks.policy)
    expected = networks.log_prob(rows)
    networks.save(folder)
    assert torch.equal(networks.log_prob(rows), expected)  # saving changes nothing
    loaders = [load_causal_lm, lambda path: AutoModelForCausalLM.from_pretrained(path).eval()]
    if not merge:
        from peft import AutoPeftModelForCausalLM

        loaders.append(lambda path: AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload().eval())
    for load in loaders:
        policy = TokenPolicy(load(str(folder)), eos_token_id=2, pad_token_id=0, max_new_tokens=6)
        with torch.no_grad():
            torch.testing.assert_close(policy.log_prob(rows), expected, rtol=0, atol=1e-5)


def test_value_heads_on_the_policys_states_take_its_pass():
    networks = shared("Llama", "heads")
    disturb(networks)
    rows = make_rows(networks.policy)
    passes = []
    trunk = networks.policy.model.model
    trunk.register_forward_hook(lambda *_: passes.append(1))
    networks.policy.log_prob(rows).sum().backward()
    networks.critic(rows.copy())["state_value"].sum().backward()
    assert len(passes) == 1
    own = networks.critic(rows.copy())["state_value"]
    assert len(passes) == 2
    networks.policy.log_prob(rows)
    torch.testing.assert_close(networks.critic(rows.copy())["state_value"], own)
    networks.policy.log_prob(rows)
    networks.critic(make_rows(networks.policy, seed=5))
    assert len(passes) == 5  # of other tokens they are computed


def test_heads_beside_full_copies_belong_to_the_critic():
    networks = FullCopies(make_policy("GPT-2"), None, 3, critic="heads")
    roles = networks.parameters()
    assert len(roles["critic"]) == 2
    assert len(roles["policy"]) == len(list(networks.policy.parameters()))


def test_an_adapter_on_the_output_embeddings_is_refused():
    lora = LoraSettings(r=2, alpha=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="output embeddings"):
        SharedTrunk(make_policy("Llama"), None, 3, lora=lora)


def test_the_state_of_a_run_comes_back():
    networks = shared("GPT-2")
    disturb(networks)
    rows = make_rows(networks.policy)
    state = copy.deepcopy(networks.state_dict())
    other = shared("GPT-2")
    other.load_state_dict(state)
    assert torch.equal(other.log_prob(rows), networks.log_prob(rows))
    assert torch.equal(other.values(rows), networks.values(rows))
    assert set(state) == {"adapters", "critic"}  # no trunk: it is the model's


def test_adapter_dropout_works_where_gradients_are_taken_alone():
    lora = LoraSettings(r=4, alpha=8, dropout=0.5, target_modules="all-linear")
    networks = SharedTrunk(make_policy("GPT-2"), None, 3, lora=lora)
    disturb(networks)
    rows = make_rows(networks.policy)
    assert torch.equal(networks.log_prob(rows), networks.log_prob(rows))
    torch.manual_seed(0)
    first, second = networks.policy.log_prob(rows), networks.policy.log_prob(rows)
    assert not torch.equal(first, second)


def test_autocast_computes_in_bfloat16_on_float32_weights():
    networks = shared("Llama", autocast=True)
    plain = shared("Llama")
    for each in (networks, plain):
        disturb(each)
    rows = make_rows(networks.policy)
    found, expected = networks.log_prob(rows), plain.log_prob(rows)
    apart = (found - expected).abs()[rows["action_mask"]]
    assert 0 < apart.mean() <= 16 * 2**-8 * expected.abs().max()
    assert networks.policy.dtype == torch.bfloat16
    assert next(networks.policy.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_output_layer_reads_a_prompts_last_state_in_one_product(name):
    """Not once a row: PyTorch folds a slice of states only where the weight is trained."""
    networks, seen = shared(name, dtype=torch.bfloat16), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                seen.append(args[1].shape[-1])
            return func(*args, **(kwargs or {}))

    prompts = make_rows(networks.policy).select("prompt_tokens", "prompt_mask")
    vocabulary = networks.policy.model.get_output_embeddings().weight.shape[0]
    with Products():
        networks.reference(prompts.clone(), 2)
        networks.policy(prompts.clone(), 2)
    assert vocabulary not in seen
