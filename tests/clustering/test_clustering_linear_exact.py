"""Exact M-steps of the linear mixture, against an EM written apart in NumPy and SciPy."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp

from torchrl_maxmin.clustering import fit_bradley_terry, fit_linear_mixture, solvers
from torchrl_maxmin.clustering.choices import PairChoices, user_blocks


def random_problem(rng, max_users=7, max_pairs=5):
    """Pairs of a few users, some without any; half the problems weigh their rows."""
    counts = rng.integers(0, max_pairs + 1, size=rng.integers(2, max_users + 1))
    counts[0] += 1
    x = rng.normal(size=(counts.sum(), rng.integers(1, 5))) * rng.choice([0.3, 1.0, 3.0])
    row_weights = rng.choice([0.5, 1.0], size=len(x)) if rng.random() < 0.5 else None
    offsets = np.concatenate([[0], counts.cumsum()])
    return x, offsets, row_weights, 10.0 ** rng.uniform(-4, -1)


def planted(shares, pairs=20, strength=3.0, features=6, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(len(shares)), shares))
    tastes = np.linalg.qr(rng.normal(size=(features, features)))[0][: len(shares)] * strength
    x = rng.normal(size=(len(truth) * pairs, features))
    margins = (x * tastes[np.repeat(truth, pairs)]).sum(-1)
    x *= np.where(rng.random(len(x)) < expit(margins), 1, -1)[:, None]
    return torch.from_numpy(x), torch.arange(len(truth) + 1) * pairs, truth, torch.from_numpy(tastes)


def fit(x, offsets, num_groups, row_weights=None, **settings):
    return fit_linear_mixture(
        torch.as_tensor(x),
        torch.as_tensor(offsets),
        num_groups,
        m_step="exact",
        row_weights=None if row_weights is None else torch.as_tensor(row_weights),
        **settings,
    )


def oracle_joint(x, offsets, row_weights, weight, log_prior):
    log_choice = log_expit(x @ weight.T) * (1.0 if row_weights is None else row_weights[:, None])
    sums = [log_choice[a:b].sum(0) for a, b in itertools.pairwise(offsets)]
    return np.array(sums) + log_prior


def oracle_objective(x, offsets, row_weights, weight, log_prior, l2, hard):
    joint = oracle_joint(x, offsets, row_weights, weight, log_prior)
    explained = joint.max(-1) if hard else logsumexp(joint, axis=-1)
    total = len(x) if row_weights is None else row_weights.sum()
    return (explained.sum() + log_prior.mean()) / total - l2 * (weight**2).sum()


def oracle_em(x, offsets, row_weights, weight, num_rounds, l2, hard):
    """EM from given heads; every head by a trust region with exact Hessians."""
    num_groups = len(weight)
    log_prior = np.full(num_groups, -np.log(num_groups))
    row_users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    row_weights = np.ones(len(x)) if row_weights is None else row_weights
    for done in range(num_rounds + 1):
        joint = oracle_joint(x, offsets, row_weights, weight, log_prior)
        r = np.exp(joint - logsumexp(joint, axis=-1, keepdims=True))
        if hard:
            r = np.eye(num_groups)[r.argmax(-1)]
        if done == num_rounds:
            return weight, log_prior, r, logsumexp(joint, axis=-1).sum()
        log_prior = np.log((r.sum(0) + 1 / num_groups) / (len(r) + 1))
        heads = []
        for k in range(num_groups):
            c, penalty = r[row_users, k] * row_weights, l2 * row_weights.sum()

            def loss(w, c=c, penalty=penalty):
                return -(c * log_expit(x @ w)).sum() + penalty * w @ w

            def slope(w, c=c, penalty=penalty):
                return -x.T @ (c * expit(-x @ w)) + 2 * penalty * w

            def curvature(w, c=c, penalty=penalty):
                s = c * expit(x @ w) * expit(-x @ w)
                return (x * s[:, None]).T @ x + 2 * penalty * np.eye(x.shape[1])

            found = minimize(
                loss, weight[k], jac=slope, hess=curvature, method="trust-exact", options={"gtol": 1e-10}
            )
            heads.append(found.x)
        weight = np.array(heads)


def test_the_objective_never_falls_over_a_thousand_problems():
    rng = np.random.default_rng(0)
    rounds_seen, repairs_seen = 0, 0
    for _ in range(1000):
        x, offsets, row_weights, l2 = random_problem(rng)
        hard, num_groups = bool(rng.integers(2)), int(rng.integers(2, 4))
        fitted = fit(
            x,
            offsets,
            num_groups,
            row_weights,
            assignment="hard" if hard else "soft",
            num_restarts=1,
            num_rounds=4,
            l2=l2,
            generator=torch.Generator().manual_seed(int(rng.integers(2**31))),
        )
        values = [record["em/objective"] for record in fitted.history]
        for before, after in zip(fitted.history, fitted.history[1:], strict=False):
            if before["em/repaired_groups"]:
                repairs_seen += 1
            else:
                assert after["em/objective"] >= before["em/objective"] - 1e-10
        rounds_seen += len(values)
        own = oracle_objective(
            x, offsets, row_weights, fitted.weight.numpy(), fitted.log_prior.numpy(), l2, hard
        )
        assert fitted.restart_scores[0] == pytest.approx(own, abs=1e-10)
        repaired = [record["em/objective"] for record in fitted.history if record["em/repaired_groups"]]
        assert own >= max([values[-1], *repaired]) - 1e-10
    assert rounds_seen > 4000
    assert repairs_seen > 100


def test_equal_to_an_em_written_apart():
    rng = np.random.default_rng(1)
    compared = 0
    while compared < 40:
        x, offsets, row_weights, l2 = random_problem(rng, max_users=10, max_pairs=8)
        hard, num_groups = bool(rng.integers(2)), int(rng.integers(2, 4))
        start = rng.normal(size=(num_groups, x.shape[1]))
        settings = {"assignment": "hard" if hard else "soft", "num_rounds": 5, "l2": l2}
        fitted = fit(x, offsets, num_groups, row_weights, start=torch.from_numpy(start), **settings)
        if any(record["em/repaired_groups"] for record in fitted.history):
            continue  # the oracle knows no repair
        weight, log_prior, r, log_likelihood = oracle_em(x, offsets, row_weights, start, 5, l2, hard)
        assert fitted.log_likelihood == pytest.approx(log_likelihood, rel=1e-6)
        # the oracle stops at a gradient of 1e-10; the curvature is at least that of the penalty
        total = len(x) if row_weights is None else row_weights.sum()
        short = 1e-10 / (2 * l2 * total) * np.linalg.norm(x, axis=1).max()
        np.testing.assert_allclose(x @ fitted.weight.numpy().T, x @ weight.T, atol=1e-6 + short)
        np.testing.assert_allclose(fitted.responsibilities, r, atol=1e-6)
        np.testing.assert_allclose(fitted.log_prior, log_prior, atol=1e-6)
        compared += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_group_is_bradley_terry_bit_for_bit(dtype, weighted):
    x, offsets, _, _ = planted((9,), strength=0.7)
    row_weights = torch.rand(len(x), generator=torch.Generator().manual_seed(0)) if weighted else None
    x = x.to(dtype)
    mixture = fit_linear_mixture(x, offsets, 1, m_step="exact", row_weights=row_weights, l2=1e-3)
    plain = fit_bradley_terry(x, l2=1e-3, row_weights=row_weights)
    assert torch.equal(mixture.weight[0], plain)
    assert (mixture.responsibilities == 1).all()
    assert mixture.log_prior.item() == 0
    wide, c = x.double().numpy(), np.ones(len(x)) if row_weights is None else row_weights.double().numpy()
    found = minimize(
        lambda w: -(c * log_expit(wide @ w)).sum() / c.sum() + 1e-3 * w @ w, np.zeros(x.shape[1]), tol=1e-12
    )
    np.testing.assert_allclose(plain, found.x, atol=1e-5)


def test_order_of_groups_and_users_changes_nothing():
    x, offsets, truth, _ = planted((9, 6), pairs=8)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(3, x.shape[1], generator=generator, dtype=torch.float64)
    settings = {"num_rounds": 8, "l2": 1e-3}
    first = fit(x, offsets, 3, start=start, **settings)
    order = torch.tensor([2, 0, 1])
    groups = fit(x, offsets, 3, start=start[order], **settings)
    torch.testing.assert_close(groups.weight, first.weight[order], atol=1e-9, rtol=0)
    torch.testing.assert_close(groups.responsibilities, first.responsibilities[:, order], atol=1e-9, rtol=0)
    assert groups.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-9)
    users = torch.randperm(len(truth), generator=generator)
    moved = PairChoices(x, offsets).take_users(users)
    shuffled = fit(moved.differences, moved.user_offsets, 3, start=start, **settings)
    torch.testing.assert_close(shuffled.responsibilities, first.responsibilities[users], atol=1e-9, rtol=0)
    assert shuffled.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-9)


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_converged_on_likelihood_and_assignments(assignment):
    x, offsets, _, _ = planted((20, 12), pairs=8, strength=2.0)
    settings = {"assignment": assignment, "num_restarts": 1, "l2": 1e-3, "num_rounds": 200}
    fitted = fit(
        x, offsets, 2, convergence_tolerance=1e-6, generator=torch.Generator().manual_seed(0), **settings
    )
    history = fitted.history
    assert 3 <= len(history) < 100
    assert history[-1]["em/users_changed"] == 0
    rises = np.diff([record["em/objective"] for record in history])
    changed = np.array([record["em/users_changed"] for record in history[1:]])
    assert rises[-1] < 1e-6
    assert ((rises[:-1] >= 1e-6) | (changed[:-1] > 0)).all()  # no earlier round would have stopped
    on = fit(x, offsets, 2, start=fitted.weight, **(settings | {"num_rounds": 30}))
    assert len(on.history) == 31
    assert torch.equal(on.assignments, fitted.assignments)
    assert on.log_likelihood == pytest.approx(fitted.log_likelihood, abs=0.05)


def test_adam_stops_when_asked():
    x, offsets, _, _ = planted((8, 8), pairs=10)
    settings = {"num_restarts": 1, "generator": torch.Generator().manual_seed(0), "num_rounds": 400}
    fitted = fit_linear_mixture(x.float(), offsets, 2, convergence_tolerance=1e-4, **settings)
    assert 5 < len(fitted.history) < 400
    assert fitted.history[-1]["em/users_changed"] == 0


def test_an_empty_group_is_repaired_and_logged():
    """Both tastes agree well with their sum: all users go to that head, and the other is left empty."""
    x, offsets, truth, tastes = planted((16, 10), strength=4.0)
    start = torch.stack([tastes.sum(0), -tastes.sum(0)])
    fitted = fit(x, offsets, 2, start=start, assignment="hard", l2=1e-3, convergence_tolerance=1e-6)
    assert fitted.history[0]["em/repaired_groups"] == [1]
    found = fitted.assignments.numpy()
    assert max((found == truth).mean(), (found != truth).mean()) >= 0.95


def test_a_repair_that_does_not_pay_is_taken_back():
    x, offsets, _, tastes = planted((20,), strength=2.0)
    start = torch.stack([tastes[0], -tastes[0]])
    fitted = fit(x, offsets, 2, start=start, l2=0.1, num_rounds=20)
    repaired = [record["em/objective"] for record in fitted.history if record["em/repaired_groups"]]
    assert len(repaired) >= 1
    assert fitted.restart_scores[0] >= max(repaired)


def test_restarts_are_scored_by_the_penalised_likelihood():
    x, offsets, _, _ = planted((7, 5), pairs=4, strength=1.0)
    generator = torch.Generator().manual_seed(5)
    alone = [fit(x, offsets, 3, num_restarts=1, l2=0.01, generator=generator) for _ in range(5)]
    together = fit(
        x, offsets, 3, num_restarts=5, l2=0.01, generator=torch.Generator().manual_seed(5), num_rounds=50
    )
    scores = [fitted.restart_scores[0] for fitted in alone]
    assert together.restart_scores == scores
    assert len(set(scores)) > 1
    assert torch.equal(together.weight, alone[int(np.argmax(scores))].weight)


def test_a_row_of_weight_two_is_the_row_twice():
    x, offsets, _, _ = planted((6, 4), pairs=5, strength=1.0)
    twice = torch.cat([x[a:b].repeat(2, 1) for a, b in itertools.pairwise(offsets)])
    start = torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(0))
    for m_step in ("exact", "adam", "gradient"):
        settings = {"m_step": m_step, "start": start, "num_rounds": 6}
        weighted = fit_linear_mixture(x, offsets, 2, row_weights=torch.full((len(x),), 2.0), **settings)
        doubled = fit_linear_mixture(twice, offsets * 2, 2, **settings)
        torch.testing.assert_close(weighted.weight, doubled.weight, atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(weighted.responsibilities, doubled.responsibilities, atol=1e-8, rtol=1e-6)
        assert weighted.log_likelihood == pytest.approx(doubled.log_likelihood, rel=1e-9)


def test_ties_halved_say_nothing_of_direction():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ties = torch.stack([x, -x], 1).flatten(0, 1)
    choices = PairChoices(ties, torch.arange(7) * 10, torch.full((60,), 0.5))
    assert choices.num_choices == 30
    assert choices.choices_by_user.tolist() == [5] * 6
    assert fit_bradley_terry(ties, row_weights=choices.row_weights).abs().max() < 1e-12


def test_lbfgs_agrees_with_newton(monkeypatch):
    x, offsets, _, _ = planted((8, 6), pairs=6, strength=1.5)
    settings = {"start": torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), "num_rounds": 6}
    newton = fit(x, offsets, 2, l2=1e-2, **settings)
    monkeypatch.setattr(solvers, "NEWTON_MAX_FEATURES", 0)
    lbfgs = fit(x, offsets, 2, l2=1e-2, **settings)
    assert not torch.equal(newton.weight, lbfgs.weight)
    torch.testing.assert_close(newton.weight, lbfgs.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(newton.responsibilities, lbfgs.responsibilities, atol=1e-6, rtol=0)
    rises = np.diff([record["em/objective"] for record in lbfgs.history])
    assert rises.min() >= -1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "features", "noise", "l2"), [(6, 512, 0.0, 1e-6), (40, 256, 1e-3, 1e-4), (50, 384, 1e-2, 1e-6)]
)
def test_features_that_nearly_all_go_one_way(rows, features, noise, l2, dtype):
    """As those of a language model do: a float32 Hessian is then not positive definite."""
    rng = np.random.default_rng(0)
    common = 3 * rng.normal(size=features) * rng.normal(size=(rows, 1))
    x = torch.as_tensor(common + noise * rng.normal(size=(rows, features)), dtype=dtype)
    pairs = x.double().numpy()

    def objective(weight):
        margins = pairs @ weight
        gradient = -pairs.T @ expit(-margins) / rows + 2 * l2 * weight
        return -log_expit(margins).mean() + l2 * weight @ weight, gradient

    options = {"maxiter": 20_000, "maxfun": 20_000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 50}
    apart = minimize(objective, np.zeros(features), jac=True, method="L-BFGS-B", options=options)
    assert objective(fit_bradley_terry(x, l2=l2).double().numpy())[0] < apart.fun + 1e-8


def test_no_penalty_on_separable_pairs_stays_finite():
    x = torch.rand(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = fit_bradley_terry(x, l2=0.0)
    assert plain.isfinite().all()
    assert (x @ plain).min() > 5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block_rows", [1, 7, 1500, None])
def test_one_pass_gives_the_gradient_of_the_observed_likelihood(weighted, block_rows):
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 9, (700,), generator=generator)
    offsets = torch.cat([torch.tensor([0]), counts.cumsum(0)])
    x = torch.randn(int(offsets[-1]), 5, generator=generator, dtype=torch.float64)
    row_weights = torch.rand(len(x), generator=generator, dtype=torch.float64) if weighted else None
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    log_prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    log_choice = torch.log(torch.sigmoid(x @ weight.T)) * (
        1.0 if row_weights is None else row_weights[:, None]
    )
    users = torch.repeat_interleave(counts)
    joint = torch.zeros(700, 3, dtype=torch.float64).index_add(0, users, log_choice) + log_prior
    joint.logsumexp(-1).sum().backward()
    step = PairChoices(x, offsets, row_weights).expectation(
        weight.detach(), log_prior, gradient=True, block_rows=block_rows
    )
    torch.testing.assert_close(step.responsibilities, joint.detach().softmax(-1), atol=1e-10, rtol=0)
    torch.testing.assert_close(step.log_likelihood, joint.detach().logsumexp(-1), atol=1e-10, rtol=0)
    torch.testing.assert_close(step.gradient, weight.grad, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    ("rows", "features", "groups"), [(0, 3, 2), (3, 7, 1), (1025, 130, 2), (2500, 64, 8)]
)
def test_products_with_few_columns(monkeypatch, rows, features, groups, onednn, dtype):
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, features), (rows, groups), (groups, features))
    x, slope, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    close = {"rtol": 2e-2, "atol": 1.0} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    margins, slope_sum = solvers.narrow_margins(x, weight), solvers.narrow_slope_sum(slope, x)
    torch.testing.assert_close(margins.double(), x.double() @ weight.double().T, **close)
    torch.testing.assert_close(slope_sum.double(), slope.double().T @ x.double(), **close)


def test_blocks_hold_whole_users():
    offsets = torch.tensor([0, 3, 3, 10, 11, 30, 31, 31])
    for block_rows in (1, 4, 12, 100):
        blocks = list(user_blocks(offsets, block_rows))
        assert blocks[0][0].start == 0
        assert blocks[-1][0].stop == 7
        for (users, rows), (next_users, _) in zip(blocks, [*blocks[1:], (slice(7, 7), None)], strict=True):
            assert users.stop == next_users.start
            assert (rows.start, rows.stop) == (int(offsets[users.start]), int(offsets[users.stop]))


def test_gradient_steps_reach_the_exact_optimum(tmp_path):
    """From features in a file, a pass a round."""
    x, offsets, _, _ = planted((25, 15), pairs=10, strength=2.0)
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=tuple(x.shape))
    mapped[:] = x.numpy()
    start = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    settings = {"start": start, "l2": 1e-3}
    exact = fit(x, offsets, 2, num_rounds=60, **settings)
    streamed = fit_linear_mixture(
        torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="r+")),
        offsets,
        2,
        m_step="gradient",
        num_rounds=400,
        learning_rate=0.05,
        **settings,
    )
    assert streamed.weight.dtype == torch.float32
    assert streamed.log_likelihood == pytest.approx(exact.log_likelihood, abs=0.05)
    torch.testing.assert_close(streamed.weight.double(), exact.weight, atol=0.02, rtol=0)
    assert streamed.history[-1]["em/log_likelihood"] > streamed.history[0]["em/log_likelihood"] + 0.1


def test_unknown_settings_are_named():
    x, offsets, _, _ = planted((4,), pairs=2)
    with pytest.raises(ValueError, match="m_step is one of adam, exact, gradient, not 'sgd'"):
        fit_linear_mixture(x, offsets, 2, m_step="sgd")
    with pytest.raises(ValueError, match="'soft' or 'hard', not 'firm'"):
        fit_linear_mixture(x, offsets, 2, assignment="firm")
