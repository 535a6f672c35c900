"""Estimators by name on K columns: every column is TorchRL's estimate of one reward."""

import pytest
import torch
from loss_data import batch, categorical_actor, critic, gaussian_actor, rollout
from torchrl.modules import PercentileValueNorm, PopArtValueNorm, RunningValueNorm
from torchrl.objectives import ClipPPOLoss, ValueEstimators
from torchrl.objectives.value import (
    TD0Estimator,
    TD1Estimator,
    TDLambdaEstimator,
)
from torchrl.objectives.value.functional import vtrace_advantage_estimate

from torchrl_maxmin.objectives import (
    MaxMinPPOLoss,
    VectorGAE,
    VectorTD0,
    VectorTD1,
    VectorTDLambda,
    VectorVTrace,
    masked_mean,
    ratio_statistics,
    scalarise_advantage,
    whiten,
)

GROUPS = 3
PAIRS = {
    "TD0": (VectorTD0, TD0Estimator, {"gamma": 0.9}),
    "TD1": (VectorTD1, TD1Estimator, {"gamma": 0.9}),
    "TDLambda": (VectorTDLambda, TDLambdaEstimator, {"gamma": 0.9, "lmbda": 0.8}),
}
BY_NAME = [*PAIRS, "GAE", "VTrace"]


def steps(shape=(4, 7), seed=0, **entries):
    """A rollout with values, ended and cut here and there, without weights."""
    data = rollout(shape, GROUPS, None, seed=seed)
    generator = torch.Generator().manual_seed(seed + 9)
    data["state_value"] = torch.randn(*shape, GROUPS, generator=generator)
    data["next", "state_value"] = torch.randn(*shape, GROUPS, generator=generator)
    data["next", "terminated"] = torch.rand(*shape, 1, generator=generator) < 0.2
    data["next", "done"] = data["next", "terminated"] | (torch.rand(*shape, 1, generator=generator) < 0.2)
    return data.update(entries)


def column(data, k):
    one = data.clone()
    for key in ("state_value", ("next", "state_value"), ("next", "reward")):
        one[key] = data[key][..., k : k + 1]
    return one


@pytest.mark.parametrize("options", [{}, {"average_rewards": True}, {"differentiable": True}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_every_column_is_torchrls(name, options):
    ours, theirs, base = PAIRS[name]
    data = steps(steps_to_next_obs=torch.randint(1, 3, (4, 7, 1), generator=torch.Generator().manual_seed(1)))
    for one in (data, data.exclude("steps_to_next_obs")):
        kept = one.clone()
        out = ours(value_network=None, **base, **options)(one.clone())
        for k in range(GROUPS):
            alone = theirs(value_network=None, **base, **options)(column(one, k))
            for key in ("advantage", "value_target"):
                assert torch.equal(out[key][..., k : k + 1], alone[key])
        assert torch.equal(out["next", "reward"], kept["next", "reward"])  # the rows are the caller's


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("name", ["TD1", "TDLambda"])
def test_another_time_dimension(name, time_dim):
    ours, theirs, base = PAIRS[name]
    out = ours(value_network=None, **base)(steps(), time_dim=time_dim)
    for k in range(GROUPS):
        alone = theirs(value_network=None, time_dim=time_dim, **base)(column(steps(), k))
        torch.testing.assert_close(out["value_target"][..., k : k + 1], alone["value_target"])


def test_standardised_rewards_and_padding_do_not_go_together():
    data = steps(mask=torch.ones(4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="average_rewards counts padding"):
        VectorTD0(gamma=0.9, value_network=None, average_rewards=True, mask_key="mask")(data)


def vtrace_by_hand(data, log_ratio, k, **options):
    """V-trace of one column by the recursion of the paper, in float64."""
    gamma, rho_bar, c_bar = 0.9, options.get("rho_thresh", 1.0), options.get("c_thresh", 1.0)
    reward, value, following = (
        data[key][..., k].double() for key in (("next", "reward"), "state_value", ("next", "state_value"))
    )
    done, terminated = (data["next", key].squeeze(-1) for key in ("done", "terminated"))
    ratio = log_ratio.double().exp()
    rho, c = ratio.clamp(max=rho_bar), ratio.clamp(max=c_bar)
    targets, advantages = torch.zeros_like(value), torch.zeros_like(value)
    for b in range(value.shape[0]):
        ahead, behind = 0.0, None  # v_s - V of the next step, and v of the next step
        for t in reversed(range(value.shape[1])):
            bootstrap = 0.0 if terminated[b, t] else gamma * following[b, t]
            delta = rho[b, t] * (reward[b, t] + bootstrap - value[b, t])
            ahead = delta + (0.0 if done[b, t] else gamma * c[b, t] * ahead)
            targets[b, t] = value[b, t] + ahead
            after = following[b, t] if done[b, t] or behind is None else behind
            gained = 0.0 if terminated[b, t] else gamma * after
            advantages[b, t] = rho[b, t] * (reward[b, t] + gained - value[b, t])
            behind = targets[b, t]
    return advantages, targets


@pytest.mark.parametrize("options", [{}, {"rho_thresh": 0.8, "c_thresh": 0.5}], ids=str)
def test_v_trace_takes_the_ratio_of_the_actions_in_the_data(options):
    loss = MaxMinPPOLoss(categorical_actor(), critic(GROUPS))
    loss.make_value_estimator(ValueEstimators.VTrace, gamma=0.9, value_network=None, **options)
    assert isinstance(loss.value_estimator, VectorVTrace)
    data = steps()
    out = loss.value_estimator(data.clone())
    with torch.no_grad():
        log_policy = categorical_actor().get_dist(data.clone()).log_prob(data["action"])
    log_ratio = log_policy - data["sample_log_prob"]
    assert log_ratio.exp().max() > 1 > log_ratio.exp().min()
    for k in range(GROUPS):
        advantage, target = vtrace_by_hand(data, log_ratio, k, **options)
        torch.testing.assert_close(out["advantage"][..., k].double(), advantage, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out["value_target"][..., k].double(), target, atol=1e-5, rtol=1e-5)
        theirs = vtrace_advantage_estimate(
            0.9, log_policy.unsqueeze(-1), data["sample_log_prob"].unsqueeze(-1),
            *(column(data, k)[key] for key in ("state_value", ("next", "state_value"), ("next", "reward"))),
            data["next", "done"], data["next", "terminated"], **options,
        )  # fmt: skip
        torch.testing.assert_close(out["advantage"][..., k : k + 1], theirs[0])
    other = data.clone().set("action", (data["action"] + 1) % 4)
    assert not torch.allclose(loss.value_estimator(other)["advantage"], out["advantage"])


def test_v_trace_for_a_scoring_or_continuous_policy_follows_its_parameters():
    loss = MaxMinPPOLoss(gaussian_actor(), critic(2), entropy_bonus=False)
    loss.make_value_estimator(ValueEstimators.VTrace)
    data = rollout()
    data["action"] = torch.rand(4, 6, 4, generator=torch.Generator().manual_seed(3)) - 0.5
    before = loss(data)["loss_objective"]
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.05)
    assert loss(data)["loss_objective"].isfinite()
    assert not torch.equal(loss(data)["loss_objective"], before)


def on_policy(data, shape):
    return torch.zeros(*shape, 1)


def test_average_adv_of_v_trace_standardises_the_weighted_advantage():
    data = steps(group_weights=torch.tensor([0.2, 0.3, 0.5]).expand(4, 7, 3))
    raw, standard = (
        VectorVTrace(gamma=0.9, value_network=None, average_adv=average, log_ratio=on_policy)(data.clone())
        for average in (False, True)
    )
    raw, standard = raw["advantage"], standard["advantage"]
    torch.testing.assert_close(standard, (raw - raw.mean()) / raw.std())


@pytest.mark.parametrize(
    "form", [lambda name: ValueEstimators[name], str, str.lower], ids=["enum", "str", "lower"]
)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_loss_takes_them_by_name(name, form):
    loss = MaxMinPPOLoss(categorical_actor(), critic(2))
    loss.make_value_estimator(form(name), gamma=0.9)
    assert loss.value_type == ValueEstimators[name]
    data = rollout()
    losses = loss(data)
    assert all(value.isfinite().all() for value in losses.values())
    outside = loss.value_estimator(
        data.clone(),
        params=loss.critic_network_params.detach(),
        target_params=loss.target_critic_network_params,
    )
    weighted = scalarise_advantage(outside["advantage_per_group"], data["group_weights"])
    assert torch.equal(outside["advantage"], weighted)
    assert not outside["advantage"].requires_grad
    for key, value in loss(outside).items():
        torch.testing.assert_close(value, losses[key])


@pytest.mark.parametrize("name", PAIRS)
def test_one_group_is_clip_ppos_to_the_bit(name):
    ours, theirs = (kind(categorical_actor(), critic(1)) for kind in (MaxMinPPOLoss, ClipPPOLoss))
    data = rollout(columns=1, weights=(1.0,))
    for loss in (ours, theirs):
        loss.make_value_estimator(ValueEstimators[name], gamma=0.7)
    for key in ("loss_objective", "loss_critic"):
        assert torch.equal(ours(data)[key], theirs(data)[key])


# -- one step, no spread, nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weights", [None, (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("groups", [False, True])
def test_one_step_or_no_spread_standardises_to_zero(masked, weights, groups):
    for shape, constant in (((1, 1), False), ((4, 7), True)):
        data = steps(shape)
        if constant:  # a mean of these rounds
            data["state_value"] = data["next", "state_value"] = torch.zeros(*shape, GROUPS)
            data["next", "reward"] = torch.tensor([1000.1, 0.1, -3e7]).expand(*shape, 3).clone()
            data["next", "done"] = data["next", "terminated"] = torch.ones(*shape, 1, dtype=torch.bool)
        if weights is not None:
            data["group_weights"] = torch.tensor(weights).expand(*shape, 3)
        if masked:
            data["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
            data["mask"][0, 0] = True
        if groups:
            data["task"] = torch.arange(shape[0])[:, None].expand(shape)
        estimator = VectorGAE(
            gamma=0.9, lmbda=0.9, value_network=None, average_gae=True,
            mask_key="mask" if masked else "auto", group_key="task" if groups else None,
        )  # fmt: skip
        assert (estimator(data)["advantage"] == 0).all()


def test_standardising_within_groups_keeps_those_with_a_spread():
    data = steps((3, 4))
    data["task"] = torch.tensor([[0], [1], [1]]).expand(3, 4)
    data["state_value"][0] = data["next", "reward"][0] = 0.0
    data["next", "terminated"] = data["next", "done"] = torch.ones(3, 4, 1, dtype=torch.bool)
    options = {"gamma": 0.9, "lmbda": 0.9, "value_network": None}
    raw = VectorGAE(**options)(data.clone())["advantage"]
    found = VectorGAE(average_gae=True, group_key="task", **options)(data)["advantage"]
    assert (found[0] == 0).all()
    rest = raw[1:].flatten(0, 1)
    expected = (rest - rest.mean(0)) / rest.std(0)
    torch.testing.assert_close(found[1:].flatten(0, 1), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -3e7])
def test_whitening_without_spread_is_zero(value):
    values = torch.full((7, 1), value)
    mask = torch.arange(7) < 3
    assert (whiten(values) == 0).all()
    assert (whiten(values[:1]) == 0).all()
    assert (whiten(values.masked_fill(~mask[:, None], torch.nan), mask) == 0).all()
    rows = torch.cat([values, torch.arange(7.0)[:, None]], -1)
    apart = whiten(rows, exclude_dims=(-1,))
    assert (apart[:, 0] == 0).all()
    assert apart[:, 1].std(correction=0).item() == pytest.approx(1.0)
    assert whiten(torch.tensor([[1.0], [torch.nan]])).isnan().all()  # a NaN that counts is not hidden


@pytest.mark.parametrize("normalize", [False, True])
def test_a_single_step_is_whitened_as_a_single_real_step_is(normalize):
    data = batch((2, 1), 2, (0.3, 0.7))
    data["mask"] = torch.tensor([[True], [False]])
    make = {"normalize_advantage": normalize}
    padded = MaxMinPPOLoss(categorical_actor(), critic(2), loss_mask_key="mask", **make)(data)
    alone = MaxMinPPOLoss(categorical_actor(), critic(2), **make)(data[:1])
    torch.testing.assert_close(padded["loss_objective"], alone["loss_objective"])
    assert (alone["loss_objective"].item() == 0.0) == normalize


@pytest.mark.parametrize("rows", [slice(0, 0), (slice(None), slice(0, 0))], ids=["rows", "steps"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_minibatch_has_losses_of_zero(rows, masked, functional, reduction):
    data = batch(columns=2, weights=(0.3, 0.7))
    if masked:
        data["collector", "mask"] = torch.ones(4, 6, dtype=torch.bool)
    loss = MaxMinPPOLoss(
        categorical_actor(), critic(2), functional=functional, reduction=reduction, normalize_advantage=True,
        kl_to_ref_coeff=0.1, clip_value=0.2, value_norm=RunningValueNorm(shape=2), max_importance_ratio=2.0,
    )  # fmt: skip
    loss(data)
    known = {key: value.clone() for key, value in loss.value_norm.state_dict().items()}
    empty = data[rows]
    losses = loss(empty)
    terms = [value for key, value in losses.items() if key.startswith("loss_")]
    assert len(terms) == 4
    for term in terms:
        assert term.numel() == 0 if reduction == "none" else term.item() == 0.0
    assert all(value.isfinite().all() for value in losses.values())
    sum(term.sum() for term in terms).backward()
    grads = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
    assert len(grads) == 4
    assert all((grad == 0).all() for grad in grads)
    for key, value in loss.value_norm.state_dict().items():
        assert torch.equal(value, known[key])


@pytest.mark.parametrize("kind", [RunningValueNorm, PopArtValueNorm, PercentileValueNorm])
@pytest.mark.parametrize("nothing", ["rows", "mask"])
def test_statistics_survive_a_minibatch_of_nothing(kind, nothing):
    data = rollout(columns=1, weights=(1.0,))
    norm = kind(shape=1)
    loss = MaxMinPPOLoss(categorical_actor(), critic(1), advantage_norm=norm, loss_mask_key="mask")
    data["mask"] = torch.ones(4, 6, dtype=torch.bool)
    loss(data)
    known = {key: value.clone() for key, value in norm.state_dict().items()}
    losses = loss(data[:0]) if nothing == "rows" else loss(data.clone().set("mask", torch.zeros(4, 6) > 0))
    assert losses["loss_objective"].item() == losses["loss_critic"].item() == 0.0
    for key, value in norm.state_dict().items():
        assert torch.equal(value, known[key])


@pytest.mark.parametrize("name", BY_NAME)
def test_an_empty_rollout_has_no_advantage(name):
    loss = MaxMinPPOLoss(categorical_actor(), critic(2), functional=False)
    loss.make_value_estimator(ValueEstimators[name])
    out = loss.value_estimator(rollout()[:0])
    assert out["advantage"].shape == (0, 6, 1)
    assert out["advantage_per_group"].shape == out["value_target"].shape == (0, 6, 2)
    assert loss(rollout()[:0])["loss_objective"].item() == 0.0


def test_vmap_over_nothing_is_empty():
    values, mask, weights = torch.zeros(0, 5, 2), torch.ones(0, 5, dtype=torch.bool), torch.zeros(0, 2)
    assert torch.vmap(whiten)(values, mask).shape == (0, 5, 2)
    assert torch.vmap(masked_mean)(values, mask).shape == (0,)
    assert torch.vmap(scalarise_advantage)(values, weights).shape == (0, 5, 1)
    assert torch.vmap(ratio_statistics)(values[..., :1], mask)["ESS"].shape == (0,)
    some, chosen = torch.randn(3, 5, 1), torch.rand(3, 5) > 0.3
    for got, row, kept in zip(torch.vmap(whiten)(some, chosen), some, chosen, strict=True):
        torch.testing.assert_close(got, whiten(row, kept))
