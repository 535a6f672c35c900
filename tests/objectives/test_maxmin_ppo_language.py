"""The loss on a causal language model: right-padded responses, K + 1 columns, stateful modules."""

import pytest
import torch
from loss_data import gradients
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_maxmin.objectives import MaxMinPPOLoss, VectorGAE

transformers = pytest.importorskip("transformers")
B, R, K, VOCABULARY = 3, 7, 2, 23


class Scorer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, action):
        log_policy = self.model(input_ids=input_ids).logits.log_softmax(-1)
        log_prob = log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return log_prob, -(log_policy.exp() * log_policy).sum(-1)


def make_loss(**kwargs):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()  # embedding and head share their weights
    actor = TensorDictModule(Scorer(model), ["input_ids", "action"], ["log_prob", "entropy"])
    critic = TensorDictModule(nn.Embedding(VOCABULARY, K + 1), ["input_ids"], ["state_value"])
    return MaxMinPPOLoss(actor, critic, functional=False, loss_mask_key="action_mask", **kwargs)


def responses(padding):
    """Responses of lengths 7, 4 and 1; what stands in the padding is ``padding``."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(R) < torch.tensor([[7], [4], [1]])
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros(B, 1, dtype=torch.bool)], 1)

    def normal(*size):
        values = torch.randn(B, R, *size, generator=generator)
        values[~mask] = padding
        return values

    tokens = torch.randint(1, VOCABULARY, (B, R + 1), generator=generator)
    end = last.unsqueeze(-1)
    steps = TensorDict(
        {
            "state_value": normal(K + 1),
            "group_weights": torch.tensor([0.3, 0.7]).expand(B, R, K),
            "action_mask": mask,
            "next": {
                "state_value": normal(K + 1),
                "reward": normal(K + 1),
                "done": end,
                "terminated": end,
            },
        },
        batch_size=[B, R],
    )
    VectorGAE(gamma=1.0, lmbda=0.95, value_network=None, mask_key="action_mask")(steps)
    data = TensorDict(
        {
            "input_ids": tokens[:, :-1],
            "action": tokens[:, 1:],
            "action_mask": mask,
            "sample_log_prob": normal() - 3,
            "ref_log_prob": normal() - 3,
            "advantage": steps["advantage_per_group"],
            "value_target": steps["value_target"],
            "group_weights": torch.tensor([0.3, 0.7]).expand(B, K),
        },
        batch_size=[B],
    )
    return data, steps["advantage"]


def test_padding_does_not_reach_the_loss():
    make = {"normalize_advantage": True, "kl_to_ref_coeff": 0.1}
    clean, clean_grads = gradients(make_loss(**make), responses(0.0)[0])
    losses, grads = gradients(make_loss(**make), responses(float("nan"))[0])
    assert len(grads) > 5
    for key, value in clean.items():
        torch.testing.assert_close(losses[key], value)
    for name, value in clean_grads.items():
        torch.testing.assert_close(grads[name], value)


def test_weights_by_sequence_equal_the_scalarised_advantage():
    data, scalar = responses(0.0)
    losses = make_loss()(data)
    assert torch.equal(make_loss()(data.clone().set("advantage", scalar))["loss_objective"],
                       losses["loss_objective"])  # fmt: skip
    assert losses["explained_variance"].shape == (K + 1,)


def test_the_models_state_dict_keeps_its_names():
    loss = make_loss()
    assert "actor_network.module.model.transformer.wte.weight" in loss.state_dict()
    model = loss.actor_network.module.model
    assert model.lm_head.weight is model.transformer.wte.weight
