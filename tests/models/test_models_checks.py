"""A model whose samples are not what would be trained is found before any work, and the line says why."""

import copy

import pytest
import torch
from architectures import build
from transformers import GPT2LMHeadModel, OPTForCausalLM

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.checks import check_model, deviation, rounding_bound
from torchrl_maxmin.models.loading import load_causal_lm
from torchrl_maxmin.models.output_head import OutputHead


def policy_of(model, **settings):
    return TokenPolicy(model, **({"eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 8} | settings))


@pytest.fixture
def model(tiny_model):
    return load_causal_lm(tiny_model)


def subclass(model, **methods):
    model.__class__ = type("Odd", (type(model),), methods)
    return model


def test_a_sound_model_passes_and_leaves_no_trace(model):
    policy = policy_of(model)
    before = copy.deepcopy(policy.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_model(policy)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert policy.max_new_tokens == 8
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_another_head_is_found(model):
    policy = policy_of(model)
    policy.head = OutputHead(logit_scale=1.01)
    with pytest.raises(UserError, match=r"are not those of its own logits \(by 0\.\d+; float32 allows"):
        check_model(policy)


def test_positions_that_count_padding_are_found(model):
    trunk = model.transformer
    trunk.__class__ = type("Counting", (type(trunk),), {"forward": _without_positions})
    with pytest.raises(
        UserError, match="a padded prompt gets other log-probabilities than the same prompt alone"
    ):
        check_model(policy_of(model))


def _without_positions(self, input_ids=None, attention_mask=None, use_cache=None, **inputs):
    inputs.pop("position_ids", None)
    return super(type(self), self).forward(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **inputs
    )


def test_a_mask_that_is_not_respected_is_found(model):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **inputs):
        inputs |= {"position_ids": position_ids, "use_cache": use_cache}
        whole = None if attention_mask is None else torch.ones_like(attention_mask)
        return super(type(self), self).forward(input_ids=input_ids, attention_mask=whole, **inputs)

    trunk = model.transformer
    trunk.__class__ = type("Unmasked", (type(trunk),), {"forward": forward})
    with pytest.raises(UserError, match=r"cannot be trained as a policy: .* likely cause"):
        check_model(policy_of(model))


def test_a_cache_that_is_off_is_found(model):
    def forward(self, input_ids=None, past_key_values=None, position_ids=None, **inputs):
        inputs |= {"past_key_values": past_key_values, "position_ids": position_ids}
        output = GPT2LMHeadModel.forward(self, input_ids, **inputs)
        if input_ids.shape[-1] == 1 and past_key_values is not None:
            output.logits = output.logits * 0.9
        return output

    with pytest.raises(UserError, match=r"generate\(\) samples with other log-probabilities.*cache"):
        check_model(policy_of(subclass(model, forward=forward)))


def test_damaged_weights_are_one_line(model):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="gives NaN or infinity for ordinary tokens: its weights are damaged"):
        policy_of(model)
    policy = policy_of(build_sound(model))
    with torch.no_grad():
        policy.model.transformer.wpe.weight[5] = float("nan")  # no row of the first look is so long
    with pytest.raises(UserError, match="gives logits that are NaN or infinite"):
        check_model(policy)


def build_sound(model):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 0.0
    return model


def test_what_a_model_raises_is_one_line(model):
    def forward(self, input_ids=None, **inputs):
        if input_ids.shape[0] != 2:
            raise RuntimeError("needs an image\nand more")
        return GPT2LMHeadModel.forward(self, input_ids, **inputs)

    with pytest.raises(UserError, match=r"Odd fails on padded text \(RuntimeError: needs an image\)"):
        check_model(policy_of(subclass(model, forward=forward)))


def test_tiny_position_tables_and_short_responses(make_model):
    for positions in (2, 4, 8):
        check_model(policy_of(load_causal_lm(make_model(f"positions_{positions}", n_positions=positions))))
    check_model(policy_of(load_causal_lm(make_model("short_answers")), max_new_tokens=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_other_dtypes_are_judged_by_their_own_rounding(model, dtype, temperature):
    policy = policy_of(model.to(dtype), temperature=temperature)
    check_model(policy)
    policy.head = OutputHead(logit_scale=3.0)
    with pytest.raises(UserError, match="are not those of its own logits"):
        check_model(policy)


def test_bounds():
    eps = torch.finfo(torch.float32).eps
    assert rounding_bound(torch.float32, 0.1) == rounding_bound(torch.float64, 1.0) == 256 * eps
    assert rounding_bound(torch.float32, 30.0) == 30 * 256 * eps
    assert rounding_bound(torch.bfloat16, 20.0) == 16 * 20 * torch.finfo(torch.bfloat16).eps
    found, expected = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.0, 4.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    assert deviation(found, expected, mask, torch.float32) == 2.0
    assert deviation(found, expected, mask, torch.bfloat16) == 1.0


def test_a_trunk_within_the_trunk_is_read_all_the_same(tokenizer):
    model = build("OPT (projected)", tokenizer)
    assert isinstance(model, OPTForCausalLM)  # it calls its decoder, not the trunk around it
    check_model(policy_of(model))
