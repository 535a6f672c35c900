"""What stands between hidden states and logits is found by behaviour, with the gradients of the logits."""

import copy
import re

import pytest
import torch
from architectures import build
from tensordict import TensorDict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models import TokenPolicy, TokenScorer
from torchrl_maxmin.models.output_head import OutputHead
from torchrl_maxmin.models.sequences import pad_left, pad_right

PROMPTS, ACTIONS = [[1, 10, 11, 12], [1], [1, 20, 21]], [[30, 31, 2], [40, 41, 42, 2], [50]]


def tiny(**settings):
    torch.manual_seed(0)
    config = {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**(config | settings))).eval()


class Changed(GPT2LMHeadModel):
    """A GPT-2 whose logits are another function of the plain ones, or of its hidden states."""

    change = staticmethod(lambda logits: logits)
    change_states = staticmethod(lambda states: states)

    def forward(self, input_ids=None, **inputs):
        output = self.transformer(input_ids, **inputs)
        logits = self.lm_head(self.change_states(output.last_hidden_state))
        output.logits = self.change(logits)
        return output


def changed(change=None, change_states=None):
    model = tiny()
    model.__class__ = type("Changed", (Changed,), {})
    if change is not None:
        type(model).change = staticmethod(change)
    if change_states is not None:
        type(model).change_states = staticmethod(change_states)
    return model


def test_a_plain_model_keeps_the_plain_path():
    assert OutputHead.read(tiny()) == OutputHead(1.0, 1.0, None)
    for name in ("scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
        assert OutputHead.read(tiny(**{name: name != "tie_word_embeddings"})) == OutputHead()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 1 / 16, 0.3, 7.0])
def test_scale_and_soft_cap_are_found(dtype, softcap, scale):
    def change(logits):
        return logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)

    head = OutputHead.read(changed(change, lambda states: states * 0.5).to(dtype))
    assert head.bias_scale == pytest.approx(scale, rel=1e-5)
    assert head.logit_scale == pytest.approx(0.5 * scale, rel=1e-5)
    assert (head.softcap is None) == (softcap is None)
    if softcap is not None:
        assert head.softcap == pytest.approx(softcap, rel=1e-5)
    if scale == 1.0 and softcap is None:
        assert head.bias_scale == 1.0  # exactly: the operator's plain path


@pytest.mark.parametrize(
    ("change", "change_states", "message"),
    [
        (lambda z: z + torch.linspace(0, 1, z.shape[-1]), None, "changes its logits by more than"),
        (lambda z: z.clamp(-5, 5), None, "changes its logits by more than"),
        (lambda z: z * torch.linspace(1, 2, z.shape[-1]), None, "changes its logits by more than"),
        (lambda z: z[..., :-1], None, "changes its logits by more than"),
        (lambda z: z - 3.0, None, "changes its logits by more than"),
        (None, torch.tanh, "changes its hidden states"),
        (None, lambda h: h + 1.0, "changes its hidden states"),
        (None, lambda h: h * float("nan"), "gives NaN or infinity"),
    ],
)
def test_what_has_another_form_is_refused(change, change_states, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TokenPolicy(changed(change, change_states), eos_token_id=2, pad_token_id=0, max_new_tokens=3)


def test_a_head_that_is_not_called_is_refused():
    model = tiny()
    model.__class__ = type("Direct", (GPT2LMHeadModel,), {"forward": _without_head})
    with pytest.raises(UserError, match="Direct does not call its output embeddings as a module"):
        OutputHead.read(model)


def _without_head(self, input_ids=None, **inputs):
    output = self.transformer(input_ids, **inputs)
    output.logits = output.last_hidden_state @ self.lm_head.weight.T
    return output


def test_a_head_that_is_no_linear_layer_is_refused():
    class Rounded(nn.Linear):
        def forward(self, states):
            return super().forward(states).round()

    model = tiny(tie_word_embeddings=False)
    head = Rounded(16, 30, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    with pytest.raises(UserError, match="no linear layer"):
        OutputHead.read(model)


def test_reading_draws_no_random_numbers_and_leaves_no_hooks():
    model = tiny(resid_pdrop=0.5).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    OutputHead.read(model)
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def batch_of(rows=slice(None)):
    tokens, mask = pad_left(PROMPTS[rows], 0)
    action, action_mask = pad_right(ACTIONS[rows], 0)
    return TensorDict(
        {"prompt_tokens": tokens, "prompt_mask": mask, "action": action, "action_mask": action_mask},
        [len(tokens)],
    )


def whole_logits(model, temperature):
    """Log-probabilities and entropies of the responses, unpadded, by the model's own logits in float64."""
    for prompt, action in zip(PROMPTS, ACTIONS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits.double() / temperature).log_softmax(-1)
        yield (
            log_probs[torch.arange(len(action)), torch.tensor(action)],
            -(log_probs.exp() * log_probs).sum(-1),
        )


@pytest.mark.parametrize(
    "name",
    [
        "Granite (scale)",
        "Cohere (scale)",
        "MiniCPM3 (scaled states)",
        "Gemma2 (soft cap)",
        "Phi (bias)",
        "GPT-J (bias)",
    ],
)
def test_values_and_gradients_are_those_of_the_models_own_logits(name, tokenizer):
    model = build(name, tokenizer).double()
    plain = copy.deepcopy(model)
    policy = TokenPolicy(model, eos_token_id=2, pad_token_id=0, max_new_tokens=4, temperature=0.7)
    generator = torch.Generator().manual_seed(1)
    for i, (log_probs, entropy) in enumerate(whole_logits(plain, 0.7)):
        # a row at a time: padded rows of Gemma2 are NaN in float64, in transformers itself
        scored = TokenScorer(policy, entropy=True)(batch_of(slice(i, i + 1)))
        # trunks normalise in float32 whatever their weights are
        torch.testing.assert_close(scored["log_prob"][0], log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scored["entropy"][0], entropy, atol=1e-5, rtol=1e-5)
        coefficients = torch.randn(len(log_probs), generator=generator, dtype=torch.float64)
        (scored["log_prob"][0] * coefficients + 0.3 * scored["entropy"][0]).sum().backward()
        (log_probs * coefficients + 0.3 * entropy).sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    for n, parameter in model.named_parameters():
        scale = expected[n].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[n], atol=1e-4 * scale + 1e-7, rtol=1e-4, msg=n)
    head = model.get_output_embeddings()
    if head.bias is not None:
        assert head.bias.grad.abs().max() > 0.01


def test_a_copy_of_a_policy_reads_its_own_bias(tokenizer):
    policy = TokenPolicy(build("Phi (bias)", tokenizer), eos_token_id=2, pad_token_id=0, max_new_tokens=4)
    copied, batch = copy.deepcopy(policy), batch_of()
    with torch.no_grad():
        before = policy.log_prob(batch)
        assert torch.equal(copied.log_prob(batch), before)
        copied.model.lm_head.bias.add_(torch.linspace(0, 2, len(tokenizer)))
        assert torch.equal(policy.log_prob(batch), before)
        moved = copied.log_prob(batch)
        for i, (log_probs, _) in enumerate(whole_logits(copied.model, 1.0)):
            torch.testing.assert_close(moved[i, : len(log_probs)].double(), log_probs, atol=1e-5, rtol=1e-5)
    assert (moved - before).abs().max() > 0.1
