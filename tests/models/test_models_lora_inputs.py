"""Adapters that keep what they read in the trunk's precision: same values and gradients, less kept."""

import copy

import pytest
import torch
from architectures import build
from torch import nn

from torchrl_maxmin.models.lora import LoraSettings, add_adapters
from torchrl_maxmin.models.lora_inputs import WideningLinear
from torchrl_maxmin.world import build_tokenizer


def kept_bytes(run):
    """Bytes of distinct storages that autograd keeps."""
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(sizes.values()), out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_gradients_are_those_of_a_copy_in_the_weights_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(6, 3, bias=False)
    layer = WideningLinear.of(copy.deepcopy(plain))
    xs = [torch.randn(4, 5, 6, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0].data)
    slope = torch.randn(4, 5, 3, generator=generator)
    (plain(xs[0].to(torch.float32)) * slope).sum().backward()
    (layer(xs[1]) * slope).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    assert xs[1].grad.dtype == dtype
    torch.testing.assert_close(xs[1].grad, xs[0].grad)
    torch.testing.assert_close(layer(xs[1]), plain(xs[0].to(torch.float32)), rtol=0, atol=0)


def test_the_input_is_kept_as_it_is():
    layer = WideningLinear.of(nn.Linear(64, 2, bias=False))
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    kept, _ = kept_bytes(lambda: layer(x))
    assert kept == x.nbytes + layer.weight.nbytes


def test_under_autocast_it_is_a_plain_layer():
    plain = nn.Linear(6, 3, bias=False)
    layer, x = WideningLinear.of(plain), torch.randn(4, 6).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert torch.equal(out, plain(x.float()))
    out.sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_a_half_precision_trunk_keeps_less_with_adapters_and_computes_the_same(name, monkeypatch):
    tokens = torch.randint(3, 40, (4, 20), generator=torch.Generator().manual_seed(1))

    def run(narrow):
        with monkeypatch.context() as patch:
            if not narrow:
                patch.setattr("torchrl_maxmin.models.lora.keep_narrow_inputs", lambda model: None)
            trunk = build(name, build_tokenizer()).to(torch.bfloat16)
            torch.manual_seed(0)
            model = add_adapters(trunk, ["default"], LoraSettings(r=2, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(2)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        kept, logits = kept_bytes(lambda: model(input_ids=tokens).logits)
        logits.float().square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return kept, logits, gradients, model.state_dict().keys()

    kept, logits, gradients, keys = run(True)
    kept_before, logits_before, gradients_before, keys_before = run(False)
    assert torch.equal(logits, logits_before)
    assert keys == keys_before
    assert gradients.keys() == gradients_before.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_before[parameter], rtol=1e-4, atol=1e-4)
    assert kept < 0.85 * kept_before


def test_dropout_leaves_a_layer_as_it_is():
    trunk = build("Llama", build_tokenizer()).to(torch.bfloat16)
    model = add_adapters(trunk, ["default"], LoraSettings(r=2, dropout=0.1, target_modules="all-linear"))
    assert not any(isinstance(module, WideningLinear) for module in model.modules())
