"""Adapters that compute in the trunk's precision: values and gradients of the formula, less kept."""

import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model

from torchrl_maxmin.models.lora import LoraSettings, add_adapters
from torchrl_maxmin.models.lora_products import add_low_rank, compute_as_the_trunk
from torchrl_maxmin.world import build_tokenizer

#: of values of size one, summed over some terms
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def kept_bytes(run):
    """Bytes of distinct storages that autograd keeps."""
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(sizes.values()), out


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_values_and_gradients_are_those_of_the_formula_in_float64(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).float()

    result, x, a, b, slope = draw(4, 5, 7), draw(4, 5, 6), draw(3, 6), draw(7, 3), draw(4, 5, 7)
    given = [result.to(dtype), x.to(dtype), a, b]
    ours = [tensor.clone().requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in (result, x, a, b)]
    out = add_low_rank(*ours, 0.5)
    wanted = exact[0] + 0.5 * exact[1] @ exact[2].T @ exact[3].T
    (out * slope.to(dtype)).sum().backward()
    (wanted * slope).sum().backward()
    assert out.dtype == dtype
    for mine, theirs in [(out, wanted), *((m.grad, t.grad) for m, t in zip(ours, exact, strict=True))]:
        error = (mine.double() - theirs).abs().max() / theirs.abs().max()
        assert error < TOLERANCE[dtype]
    assert [tensor.grad.dtype for tensor in ours] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_half_precision_trunk_keeps_less_and_is_as_near_float32_as_by_peft(name, dropout, monkeypatch):
    tokens = torch.randint(3, 40, (4, 20), generator=torch.Generator().manual_seed(1))

    def run(narrow, dtype=torch.bfloat16):
        with monkeypatch.context() as patch:
            if not narrow:
                patch.setattr("torchrl_maxmin.models.lora.compute_as_the_trunk", lambda model: None)
            trunk = build(name, build_tokenizer()).to(torch.bfloat16).to(dtype)
            torch.manual_seed(0)
            settings = LoraSettings(r=2, dropout=dropout, target_modules="all-linear")
            model = add_adapters(trunk, ["default"], settings)
        generator = torch.Generator().manual_seed(2)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        kept, logits = kept_bytes(lambda: model(input_ids=tokens).logits)
        logits.float().square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return kept, logits.float(), gradients, model.state_dict().keys()

    kept, logits, gradients, keys = run(True)
    kept_by_peft, logits_by_peft, gradients_by_peft, keys_by_peft = run(False)
    _, exact_logits, exact_gradients, _ = run(False, torch.float32)
    assert keys == keys_by_peft
    assert gradients.keys() == gradients_by_peft.keys()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert (logits - exact_logits).norm() < 1.5 * (logits_by_peft - exact_logits).norm()

    def distance(found):
        squares = [(found[n] - exact_gradients[n]).square().sum() for n in exact_gradients]
        return torch.stack(squares).sum().sqrt()

    assert distance(gradients) < 1.5 * distance(gradients_by_peft)
    assert kept < 0.85 * kept_by_peft


def with_adapter(tokens, **config):
    """A half-precision model with a random adapter, and its logits by peft's own steps."""
    trunk = build("Llama", build_tokenizer()).to(torch.bfloat16)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **config)
    torch.manual_seed(0)
    model = get_peft_model(trunk, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.normal_()
        return model, model(input_ids=tokens).logits.float()


@pytest.mark.parametrize("config", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_what_is_no_plain_adapter_stays_pefts(config):
    tokens = torch.randint(3, 40, (2, 10), generator=torch.Generator().manual_seed(1))
    model, by_peft = with_adapter(tokens, **config)
    compute_as_the_trunk(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits.float(), by_peft)


@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_and_takes_out_again_what_it_would(safe):
    tokens = torch.randint(3, 40, (2, 10), generator=torch.Generator().manual_seed(1))
    ours, _ = with_adapter(tokens)
    by_peft, _ = with_adapter(tokens)
    compute_as_the_trunk(ours)
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (ours, by_peft):
            getattr(model, change)(**({"safe_merge": safe} if change == "merge_adapter" else {}))
        assert ours.base_model.model.state_dict().keys() == by_peft.base_model.model.state_dict().keys()
        for name, weight in by_peft.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight), (change, name)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_a_float32_trunk_computes_what_peft_does_and_keeps_no_more(name):
    tokens = torch.randint(3, 40, (4, 20), generator=torch.Generator().manual_seed(1))
    found = []
    for ours in (True, False):
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(build(name, build_tokenizer()), config).eval()
        if ours:
            compute_as_the_trunk(model)
        layers = [module for module in model.modules() if hasattr(module, "lora_variant")]
        assert layers
        assert all(bool(layer.lora_variant) == ours for layer in layers)
        with torch.no_grad():  # the sum is taken in place
            silent = model(input_ids=tokens).logits
        kept, logits = kept_bytes(lambda model=model: model(input_ids=tokens).logits)
        logits.square().sum().backward()
        torch.testing.assert_close(silent, logits)
        found.append((kept, logits, [p.grad for p in model.parameters() if p.grad is not None]))
    (kept, *mine), (kept_by_peft, *theirs) = found
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert kept <= kept_by_peft


def test_quantized_weights_are_left_to_peft():
    model = add_adapters(build("Llama", build_tokenizer()), ["default"], LoraSettings(r=2))
    layer = next(module for module in model.modules() if hasattr(module, "lora_variant"))
    layer.lora_variant.clear()
    weight = layer.get_base_layer().weight
    weight.requires_grad_(False).data = weight.data.to(torch.int8)
    compute_as_the_trunk(model)
    assert not layer.lora_variant
