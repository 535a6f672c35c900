"""EM on a reward model: planted users of the embedded world, and what training may not read."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import log_expit, logsumexp
from transformers import AutoModelForSequenceClassification

from torchrl_maxmin.clustering.em import EMSettings, converged, repair_empty_groups, run_em
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset, encode
from torchrl_maxmin.rewards import RewardMixture, fit_mixture
from torchrl_maxmin.rewards.fine_tuning import FineTuning, FineTuningSettings
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.world import sample_reviews

USERS, PAIRS = 20, 18
SETTINGS = {
    "num_groups": 2,
    "num_rounds": 2,
    "steps_per_round": 20,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "head_learning_rate": 1e-2,
    "num_restarts": 2,
}


@pytest.fixture(scope="module")
def data():
    """Twenty users: fourteen pick the longer of two reviews, six the shorter; one pick in twenty is wrong."""
    import datasets

    rng = np.random.default_rng(0)
    short = rng.permutation(USERS) < 6
    rows = []
    for i, (prompt, rest) in enumerate(sample_reviews(USERS * PAIRS, seed=0)):
        words, user = f"{prompt} {rest}".split(), i // PAIRS
        longer, shorter = " ".join(words), " ".join(words[: len(words) // 2])
        flip = short[user] ^ (rng.random() < 0.05)
        chosen, rejected = (shorter, longer) if flip else (longer, shorter)
        group = "conciseness" if short[user] else "length"
        rows.append(
            {"prompt": "", "chosen": chosen, "rejected": rejected, "user_id": f"u{user}", "group": group}
        )
    return PreferenceDataset.load(datasets.Dataset.from_list(rows))


@pytest.fixture(scope="module")
def parts(data):
    return data.split_heldout(0.2, seed=0)


@pytest.fixture(scope="module")
def fit(parts, tiny_model):
    train, heldout = parts
    return fit_mixture(train, tiny_model, heldout=heldout, **SETTINGS)


def plain_margins(model, data):
    """Margins [P, K] by the Hugging Face classifier, one unpadded text at a time."""
    head = model.model

    def score(prompt, text):
        ids = torch.tensor([encode(model.tokenizer, prompt, text)])
        return head.score(head.transformer(input_ids=ids).last_hidden_state[0, -1])

    with torch.no_grad():
        rows = zip(data.prompts, data.chosen, data.rejected, strict=True)
        return torch.stack([score(p, c) - score(p, r) for p, c, r in rows]).double().numpy()


def test_planted_users_are_placed(fit, parts):
    truth = np.array([name == "conciseness" for name in parts[0].groups])
    found = fit.responsibilities_matrix.argmax(-1).numpy()  # sorted by size: 0 is the majority
    assert np.mean([(found[truth == g] == g).mean() for g in (0, 1)]) >= 0.95


def test_groups_are_sorted_and_rows_sum_to_one(fit):
    r = fit.responsibilities_matrix
    assert r.shape == (USERS, 2)
    torch.testing.assert_close(r.sum(-1), torch.ones(USERS))
    mass = r.sum(0)
    assert mass[0] > mass[1]
    torch.testing.assert_close(fit.log_prior.exp(), (mass + 0.5) / (USERS + 1))
    assert torch.equal(fit.model.log_prior, fit.log_prior)
    assert fit.responsibilities == dict(zip(fit.user_ids, r.tolist(), strict=True))


def test_responsibilities_are_bayes_rule_on_the_returned_heads(fit, parts):
    """The heads were sorted together with the groups."""
    margins = log_expit(plain_margins(fit.model, parts[0]))
    sums = np.add.reduceat(margins, parts[0].user_offsets[:-1].numpy())
    # the E-step used the mixing weights of the round before: take any prior, the ranking is clear
    joint = sums + fit.log_prior.double().numpy()
    assert (joint.argmax(-1) == fit.responsibilities_matrix.argmax(-1).numpy()).mean() >= 0.95


def test_history(fit):
    assert len(fit.history) == 2
    for index, record in enumerate(fit.history):
        assert set(record) == {
            "round",
            "loss",
            "em/log_likelihood",
            "em/responsibility_entropy",
            "em/users_changed",
            "em/repaired_groups",
            "em/cluster_mass/0",
            "em/cluster_mass/1",
        }
        assert record["round"] == index
        assert record["em/cluster_mass/0"] + record["em/cluster_mass/1"] == pytest.approx(USERS, rel=1e-5)
        assert 0 <= record["em/responsibility_entropy"] <= math.log(2) + 1e-6
        assert -5 < record["em/log_likelihood"] < 0
    assert fit.history[-1]["em/log_likelihood"] > fit.history[0]["em/log_likelihood"]


def test_heldout_figures_against_plain_sums(fit, parts):
    heldout = parts[1]
    margins = plain_margins(fit.model, heldout)
    known = np.array([fit.responsibilities[u] for u in heldout.user_ids])
    total, right = 0.0, {0: [], 1: []}
    for u, (a, b) in enumerate(zip(heldout.user_offsets[:-1], heldout.user_offsets[1:], strict=True)):
        total += logsumexp(log_expit(margins[a:b]).sum(0), b=known[u])
        right[known[u].argmax()].extend(margins[a:b, known[u].argmax()] > 0)
    assert fit.heldout["pairs"] == len(heldout)
    assert fit.heldout["log_likelihood"] == pytest.approx(total / len(heldout), rel=1e-4)
    assert fit.heldout["head_accuracy"] == pytest.approx([np.mean(right[0]), np.mean(right[1])])


def test_report(fit):
    report = fit.report()
    assert report.startswith(f"{USERS} users in 2 group(s)\n  group 0: ")
    counts = fit.responsibilities_matrix.argmax(-1).bincount(minlength=2).tolist()
    for k, count in enumerate(counts):
        assert (
            f"group {k}: {count} users, mixing weight {fit.log_prior[k].exp():.3f}, held-out accuracy"
            in report
        )


@pytest.mark.parametrize("case", ["absent", "shuffled"])
def test_true_groups_are_never_read(fit, parts, tiny_model, case):
    """Same seed, so the fit is bit-equal; this is the test of determinism too."""
    groups = None if case == "absent" else [f"z{i % 3}" for i in range(USERS)]
    torch.manual_seed(12345)
    torch.rand(7)
    hidden = [dataclasses.replace(part, groups=groups) for part in parts]
    other = fit_mixture(hidden[0], tiny_model, heldout=hidden[1], **SETTINGS)
    assert torch.equal(other.responsibilities_matrix, fit.responsibilities_matrix)
    assert other.history == fit.history
    assert other.heldout == fit.heldout
    for name, value in fit.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


def test_another_seed_gives_another_fit(fit, parts, tiny_model):
    other = fit_mixture(parts[0], tiny_model, **(SETTINGS | {"num_rounds": 1}), seed=1)
    assert not torch.equal(other.model.model.score.weight, fit.model.model.score.weight)
    assert other.heldout == {}


def test_hard_assignment_is_one_hot(parts, tiny_model):
    fit = fit_mixture(parts[0], tiny_model, assignment="hard", **(SETTINGS | {"num_rounds": 1}))
    assert set(fit.responsibilities_matrix.flatten().tolist()) == {0.0, 1.0}
    assert (fit.responsibilities_matrix.sum(-1) == 1).all()
    assert fit.history[0]["em/responsibility_entropy"] == 0


def test_one_group_is_the_plain_bradley_terry_loss(parts, tiny_model):
    """With learning rates of 0 the loss is that of the first heads, on all pairs at once."""
    train = parts[0]
    frozen = {"learning_rate": 0.0, "head_learning_rate": 0.0, "batch_size": len(train), "num_rounds": 1}
    fit = fit_mixture(train, tiny_model, num_groups=1, steps_per_round=1, **frozen)
    assert (fit.responsibilities_matrix == 1).all()
    margins = plain_margins(fit.model, train)
    loss = -log_expit(margins).mean()
    assert fit.history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert fit.history[0]["em/log_likelihood"] == pytest.approx(-loss, rel=1e-4)


def test_one_group_trains_like_a_plain_bradley_terry_loop(parts, tiny_model, monkeypatch):
    make = RewardMixture.from_backbone

    def make_wide(*given, **named):
        """In float64 but for the scores: Adam makes full steps of gradients that are nothing but rounding."""
        mixture = make(*given, **named).double()
        mixture.register_forward_hook(lambda *call: call[-1].float())
        return mixture

    monkeypatch.setattr(RewardMixture, "from_backbone", make_wide)
    train = parts[0]
    rates = {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "reward_l2": 0.0, "weight_decay": 0.0}
    fit = fit_mixture(
        train, tiny_model, num_groups=1, num_rounds=1, steps_per_round=3, batch_size=len(train), **rates
    )
    start = fit_mixture(
        train, tiny_model, num_groups=1, num_rounds=1, steps_per_round=1, batch_size=4,
        learning_rate=0.0, head_learning_rate=0.0,
    ).model  # fmt: skip
    model = start.model
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n != "score.weight"], "lr": 1e-3},
            {"params": [model.score.weight], "lr": 1e-2},
        ],
        weight_decay=0.0,
    )
    rates_by_group = [group["lr"] for group in optimizer.param_groups]
    pad = start.tokenizer.pad_token_id
    rows = [
        encode(start.tokenizer, p, t)
        for side in (train.chosen, train.rejected)
        for p, t in zip(train.prompts, side, strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    for step in range(3):  # one step of warm-up, then half a cosine
        factor = [1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 2))][step]
        for group, rate in zip(optimizer.param_groups, rates_by_group, strict=True):
            group["lr"] = rate * factor
        chosen, rejected = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).chunk(2)
        optimizer.zero_grad()
        torch.nn.functional.softplus(rejected - chosen).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        found = fit.model.model(input_ids=ids, attention_mask=mask).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_auto_chooses_two_and_says_so(parts, tiny_model):
    few = {"num_rounds": 1, "steps_per_round": 1, "num_restarts": 1, "num_groups": "auto", "max_groups": 2}
    fit = fit_mixture(parts[0], tiny_model, **(SETTINGS | few))
    assert fit.choice.num_groups == fit.model.num_groups == 2
    assert "K=2 by the likelihood of left-out users (K=1: " in fit.report()


def test_the_fitted_folder_is_a_classifier(fit, tmp_path):
    fit.model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(plain.score.weight, fit.model.model.score.weight)
    torch.testing.assert_close(RewardMixture.from_pretrained(tmp_path).log_prior, fit.log_prior)


def test_empty_groups_get_the_users_that_are_explained_worst():
    r = torch.tensor([[0.98, 0.01, 0.01]] * 3 + [[0.01, 0.98, 0.01]] * 6)
    # users 0, 4 and 8 are explained worst, a choice at a time; user 3 has no choice
    per_choice = torch.tensor([-0.9, -0.1, -0.1, torch.nan, -0.8, -0.1, -0.1, -0.1, -0.85])
    repaired, empty = repair_empty_groups(r, per_choice, [0, 1, 2])
    assert empty == [2]
    for u in range(9):
        expected = [0.0, 0.0, 1.0] if u in (0, 4, 8) else r[u].tolist()
        assert repaired[u].tolist() == pytest.approx(expected)
    same, none = repair_empty_groups(r, per_choice, [0, 1])  # the empty one had its turn
    assert torch.equal(same, r)
    assert none == []
    same, none = repair_empty_groups(torch.eye(3), torch.zeros(3), [0, 1, 2])
    assert torch.equal(same, torch.eye(3))
    assert none == []


def test_an_empty_group_starts_anew_from_the_largest(parts, tiny_model):
    """A third group that nobody belongs to is repaired once; its head is then near the largest group's."""
    train = parts[0]
    torch.manual_seed(0)
    mixture = RewardMixture.from_causal_lm(tiny_model, 3)
    pairs = PairTokens(train, mixture.encoder(None), mixture.reader.pad_id)
    still = FineTuningSettings(
        steps_per_round=1, num_rounds=3, batch_size=8, learning_rate=0.0, head_learning_rate=0.0,
        weight_decay=0.0, reward_l2=0.0,
    )  # fmt: skip
    with torch.no_grad():
        mixture.model.score.weight[2] = -20 * mixture.model.score.weight[:2].mean(0)
    before = mixture.model.score.weight.detach().clone()
    start = torch.nn.functional.one_hot(torch.arange(USERS) % 2, 3).float()
    m_step = FineTuning(mixture, pairs, still)
    fit = run_em(pairs, m_step, EMSettings(num_rounds=3), start=start)
    assert [record["em/repaired_groups"] for record in fit.history] == [[2], [], []]
    after = mixture.model.score.weight.detach()
    assert torch.equal(after[:2], before[:2])
    largest = int(fit.history[0]["em/cluster_mass/1"] > fit.history[0]["em/cluster_mass/0"])
    gap = (after[2] - before[largest]).norm() / before[largest].norm()  # near, not the same
    assert 0 < gap < 0.3


def test_true_groups_train_a_head_each(parts, tiny_model):
    train, heldout = parts
    fit = fit_mixture(train, tiny_model, heldout=heldout, use_true_groups=True, **SETTINGS)
    assert fit.group_names == ["length", "conciseness"]
    truth = torch.tensor([fit.group_names.index(name) for name in train.groups])
    assert torch.equal(fit.responsibilities_matrix, torch.nn.functional.one_hot(truth, 2).float())
    assert all(record["em/users_changed"] == 0 for record in fit.history)
    assert min(fit.heldout["head_accuracy"]) > 0.6
    with pytest.raises(UserError, match="no group column"):
        fit_mixture(dataclasses.replace(train, groups=None), tiny_model, use_true_groups=True)


@pytest.mark.parametrize("settings", [{}, {"num_groups": "auto", "max_groups": 2}, {"use_true_groups": True}])
def test_a_run_that_was_stopped_between_rounds_is_bit_equal(parts, tiny_model, settings):
    states = []
    settings = SETTINGS | {"num_rounds": 3, "convergence_tolerance": -1.0, "steps_per_round": 4} | settings

    def keep(state):
        states.append(copy.deepcopy(state))

    whole = fit_mixture(parts[0], tiny_model, heldout=parts[1], on_round=keep, **settings)
    torch.rand(3)
    resumed = fit_mixture(parts[0], tiny_model, heldout=parts[1], resume=states[0], **settings)
    assert resumed.history == whole.history
    assert resumed.heldout == whole.heldout
    assert resumed.choice == whole.choice
    assert torch.equal(resumed.responsibilities_matrix, whole.responsibilities_matrix)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_halved_tie_says_nothing_about_its_user(parts, tiny_model):
    """Both orders at one half: the likelihood falls by their own, and the rest counts as before."""
    import datasets

    train = parts[0]
    rows = [
        {"prompt": p, "response_a": c, "response_b": r, "winner": "a", "user_id": train.user_ids[u]}
        for p, c, r, u in zip(
            train.prompts, train.chosen, train.rejected, train.row_users.tolist(), strict=True
        )
    ]
    tie = {**rows[0], "response_b": rows[1]["response_b"], "winner": "tie"}  # a pair nobody was shown before
    data = PreferenceDataset.load(datasets.Dataset.from_list([*rows, tie]), ties="halve")
    assert sorted(data.weights.tolist())[:3] == [0.5, 0.5, 1.0]
    frozen = {"learning_rate": 0.0, "head_learning_rate": 0.0, "num_rounds": 1, "steps_per_round": 1}
    plain = fit_mixture(train, tiny_model, num_groups=1, batch_size=8, **frozen)
    tied = fit_mixture(data, tiny_model, num_groups=1, batch_size=8, **frozen)
    halves = data.select_rows((data.weights < 1).nonzero().flatten().numpy())
    margin = plain_margins(plain.model, halves)[0, 0]
    total = plain.history[0]["em/log_likelihood"] * len(train)
    expected = total + (log_expit(margin) + log_expit(-margin)) / 2
    assert tied.history[0]["em/log_likelihood"] * (len(data) - 1) == pytest.approx(expected, rel=1e-5)


def test_options_of_the_model_reach_it(parts, tiny_model):
    fit = fit_mixture(
        parts[0], tiny_model, model_options={"head": "low_rank", "rank": 2}, **(SETTINGS | {"num_rounds": 1})
    )
    assert fit.model.heads.kind == "low_rank"
    assert fit.history[-1]["em/log_likelihood"] > -1


def test_convergence_needs_a_stable_partition_and_likelihood():
    def record(ll, changed=0, repaired=()):
        return {"em/log_likelihood": ll, "em/users_changed": changed, "em/repaired_groups": list(repaired)}

    assert not converged([record(-0.5)], 1e-3)
    assert converged([record(-0.5), record(-0.4995)], 1e-3)
    assert not converged([record(-0.5), record(-0.49)], 1e-3)
    assert not converged([record(-0.5), record(-0.5, changed=1)], 1e-3)
    assert not converged([record(-0.5), record(-0.5, repaired=[1])], 1e-3)


def test_mistakes(parts, tiny_model):
    with pytest.raises(ValueError, match="'soft' or 'hard'"):
        fit_mixture(parts[0], tiny_model, assignment="medium")
    with pytest.raises(UserError, match=f"{USERS + 1} is more than the {USERS} users"):
        fit_mixture(parts[0], tiny_model, num_groups=USERS + 1)
    with pytest.raises(UserError, match="no model at"):
        fit_mixture(parts[0], "no/such-model", num_groups=1)


def test_the_penalty_keeps_rewards_small(parts, tiny_model):
    """Margins decide the likelihood; only the penalty pulls on a reward's size and offset."""

    def size(reward_l2):
        settings = SETTINGS | {"num_rounds": 1, "steps_per_round": 12, "reward_l2": reward_l2}
        fit = fit_mixture(parts[0], tiny_model, **settings)
        return fit.model.score(parts[1].prompts, parts[1].chosen).square().mean().sqrt().item()

    free, held = size(0.0), size(3.0)
    assert 0 < held < 0.7 * free
