"""The K-head reward model: what transformers reads from it, and what it reads from a text."""

import json
import subprocess
import sys

import pytest
import torch

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.sequences import pad_left, pad_right
from torchrl_maxmin.preferences import encode
from torchrl_maxmin.rewards import Calibration, RewardMixture
from torchrl_maxmin.rewards.functions import FunctionRewards, load_functions
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.welfare import HardMin

PROMPTS = ["the film", "we loved", "it was really", "the", "i"]
COMPLETIONS = [
    "was great .",
    "the long story and its music",
    "awful",
    "",
    "watched it at home twice with my sister",
]


@pytest.fixture(scope="module")
def mixture(tiny_model):
    torch.manual_seed(0)
    mixture = RewardMixture.from_causal_lm(tiny_model, num_groups=3)
    mixture.log_prior.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    mixture.calibration = Calibration.fit(2 * torch.randn(20, 4, 3) + 1)
    return mixture


@pytest.fixture(scope="module")
def folder(mixture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards") / "mixture"
    mixture.save_pretrained(folder)
    return folder


PLAIN_TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, prompts, completions = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
rows = [
    tokenizer(p).input_ids + tokenizer(c, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    for p, c in zip(prompts, completions)
]
width = max(map(len, rows))
ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask).logits
assert not any(name.split(".")[0] in ("torchrl_maxmin", "maxmin_kernels") for name in sys.modules)
print(json.dumps(logits.tolist()))
"""


def test_raw_scores_equal_a_classifier_loaded_without_this_package(mixture, folder):
    argument = json.dumps([str(folder), PROMPTS, COMPLETIONS])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS, argument], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    scores = mixture.score(PROMPTS, COMPLETIONS)
    assert scores.shape == (5, 3)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert scores.std(0).min() > 0.05  # the comparison says something


def test_save_and_load_are_identical(mixture, folder):
    again = RewardMixture.from_pretrained(folder)
    for calibrated in (False, True):
        expected = mixture.score(PROMPTS, COMPLETIONS, calibrated=calibrated)
        assert torch.equal(again.score(PROMPTS, COMPLETIONS, calibrated=calibrated), expected)
    torch.testing.assert_close(again.log_prior, mixture.log_prior, atol=1e-6, rtol=0)
    assert again.num_groups == 3
    assert again.calibration.method == "sft_std"
    assert not again.model.training


def test_a_plain_classifier_folder_is_taken_uncalibrated(mixture, folder, tmp_path):
    mixture.model.save_pretrained(tmp_path)
    mixture.tokenizer.save_pretrained(tmp_path)
    plain = RewardMixture.from_pretrained(tmp_path)
    raw = mixture.score(PROMPTS, COMPLETIONS)
    assert torch.equal(plain.score(PROMPTS, COMPLETIONS, calibrated=True), raw)
    torch.testing.assert_close(plain.log_prior.exp(), torch.full((3,), 1 / 3))


def test_score_is_read_at_the_last_real_token_on_either_side_of_padding(mixture):
    rows = [encode(mixture.tokenizer, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        alone = torch.cat(
            [
                mixture.model.score(
                    mixture.model.transformer(input_ids=torch.tensor([r])).last_hidden_state[:, -1]
                )
                for r in rows
            ]
        )
        for pad in (pad_left, pad_right):
            tokens, mask = pad(rows, mixture.tokenizer.pad_token_id)
            torch.testing.assert_close(mixture(tokens, mask), alone, atol=1e-5, rtol=1e-5)
            # what lies under the padding is not read
            noisy = torch.where(mask, tokens, 17)
            torch.testing.assert_close(mixture(noisy, mask), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_scores_do_not_depend_on_batch_or_order(mixture, batch_size):
    expected = mixture.score(PROMPTS, COMPLETIONS)
    scores = mixture.score(PROMPTS[::-1], COMPLETIONS[::-1], batch_size=batch_size)
    torch.testing.assert_close(scores.flip(0), expected, atol=1e-5, rtol=1e-5)


def test_calibrated_scores(mixture):
    raw = mixture.score(PROMPTS, COMPLETIONS)
    for method in ("sft_std", "win_rate"):
        other = RewardMixture(
            mixture.model, mixture.tokenizer, calibration=Calibration.fit(torch.randn(9, 3, 3), method)
        )
        scores = other.score(PROMPTS, COMPLETIONS, calibrated=True)
        torch.testing.assert_close(scores, other.calibration.apply(raw), atol=1e-6, rtol=1e-6)


def test_head_initialisation(tiny_model):
    torch.manual_seed(0)
    weight = RewardMixture.from_causal_lm(tiny_model, num_groups=400).model.score.weight
    hidden = weight.shape[1]
    assert abs(weight.std().item() * (hidden + 1) ** 0.5 - 1) < 0.03
    assert abs(weight.mean().item()) < 4 * (hidden + 1) ** -0.5 / weight.numel() ** 0.5


def test_reward_fn_for_a_group_and_for_weights(mixture):
    scores = mixture.score(PROMPTS, COMPLETIONS, calibrated=True)
    one = mixture.reward_fn(group=1)(PROMPTS, COMPLETIONS, user_id=["ignored"] * 5)
    assert isinstance(one, list)
    torch.testing.assert_close(torch.tensor(one), scores[:, 1])
    mixed = mixture.reward_fn(weights=[0.2, 0.3, 0.5])(PROMPTS, COMPLETIONS)
    expected = 0.2 * scores[:, 0] + 0.3 * scores[:, 1] + 0.5 * scores[:, 2]
    torch.testing.assert_close(torch.tensor(mixed), expected)


def test_reward_fn_with_an_adversary_follows_the_worst_group_of_each_batch(mixture):
    scores = mixture.score(PROMPTS, COMPLETIONS, calibrated=True)
    adversary = HardMin(3)
    reward = mixture.reward_fn(adversary=adversary)
    for part in (slice(0, 5), slice(0, 2), slice(3, 5)):
        worst = scores[part].mean(0).argmin()
        values = torch.tensor(reward(PROMPTS[part], COMPLETIONS[part]))
        torch.testing.assert_close(values, scores[part, worst], atol=1e-5, rtol=1e-5)
        assert adversary.weights.argmax() == worst


def test_an_adversary_on_win_rates_without_samples_of_the_prompt_warns(mixture):
    mixture.calibration = Calibration.fit(torch.randn(4, 2, 3), "win_rate")
    with pytest.warns(UserWarning, match="offsets by prompt"):
        mixture.reward_fn(adversary=HardMin(3))


@pytest.mark.parametrize("options", [{}, {"group": 0, "weights": [1, 0, 0]}])
def test_reward_fn_takes_exactly_one_option(mixture, options):
    with pytest.raises(ValueError, match="exactly one"):
        mixture.reward_fn(**options)


def test_a_model_without_a_linear_score_head_is_refused(mixture):
    with pytest.raises(UserError, match="no linear head named 'score'"):
        RewardMixture(mixture.model.transformer, mixture.tokenizer)


def responses(tokenizer, ended=True):
    """Prompts left-padded, responses right-padded, as the policy writes them."""
    from tensordict import TensorDict

    end = [tokenizer.eos_token_id] if ended else []
    prompt, prompt_mask = pad_left([tokenizer(p).input_ids for p in PROMPTS], tokenizer.pad_token_id)
    rows = [tokenizer(c, add_special_tokens=False).input_ids + end for c in COMPLETIONS]
    action, action_mask = pad_right([*rows, [9] * 12], tokenizer.pad_token_id)
    return TensorDict(
        {
            "prompt_tokens": prompt,
            "prompt_mask": prompt_mask,
            "action": action[:-1],
            "action_mask": action_mask[:-1],
        },
        [5],
    )


def test_mixture_rewards_of_tokens_equal_scores_of_texts(mixture, tokenizer):
    batch = responses(tokenizer)
    expected = mixture.score(PROMPTS, COMPLETIONS)
    source = MixtureRewards(mixture, tokenizer)
    assert source.shared_vocabulary
    torch.testing.assert_close(source(batch), expected, atol=1e-5, rtol=1e-5)
    source.shared_vocabulary = False  # responses travel as text
    torch.testing.assert_close(source(batch), expected, atol=1e-5, rtol=1e-5)


def test_function_rewards_join_columns(tokenizer, tmp_path):
    from torchrl_maxmin.world import World

    def words(prompts, completions):
        return [len(p.split()) + 10 * len(c.split()) for p, c in zip(prompts, completions, strict=True)]

    world = World.preset("80:20")
    world.save(tmp_path / "world.json")
    (loaded,) = load_functions([str(tmp_path / "world.json")])
    source = FunctionRewards([words, loaded], tokenizer)
    assert source.num_groups == 3
    rewards = source(responses(tokenizer))
    assert rewards[:, 0].tolist() == words(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(rewards[:, 1:], torch.tensor(world(PROMPTS, COMPLETIONS), dtype=torch.float32))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (lambda n: [1.0] * (2 * n), r"shape \[4\] for 2 responses; it must give one number, or one a group"),
        (lambda n: [[1.0, 2.0]], r"shape \[1, 2\] for 2 responses"),
        (lambda n: torch.ones(n, 2, 2), r"shape \[2, 2, 2\]"),
        (lambda n: None, r"shape \[\] for"),
        (lambda n: ["good"] * n, "function fixed gives no numbers"),
        (lambda n: [[1.0], [1.0, 2.0]], "gives no numbers"),
        (lambda n: [float("nan")] * n, "gives NaN or infinity"),
        (lambda n: 1 / 0, "function fixed fails on f.prompts, completions. with ZeroDivisionError: division"),
    ],
)
def test_functions_that_give_no_rewards(tokenizer, said, message):
    def fixed(prompts, completions):
        return said(len(prompts))

    with pytest.raises(UserError, match=message):
        FunctionRewards([fixed], tokenizer)


def test_a_function_may_know_the_data_s_prompts_alone(tokenizer):
    answers = {prompt: number for number, prompt in enumerate(PROMPTS)}

    def score(prompts, completions):
        return [answers[prompt] for prompt in prompts]

    with pytest.raises(UserError, match=r"fails on f.prompts, completions. with KeyError: 'a'"):
        FunctionRewards([score], tokenizer)
    for prompts in (PROMPTS, PROMPTS[:1]):
        source = FunctionRewards([score], tokenizer, prompts)
        assert source(responses(tokenizer))[:, 0].tolist() == list(range(len(PROMPTS)))


def test_function_rewards_of_tensors_and_arrays(tokenizer):
    batch = responses(tokenizer)
    lengths = torch.tensor([len(text) for text in COMPLETIONS], dtype=torch.float32)
    kinds = [list, torch.Tensor.numpy, torch.Tensor.requires_grad_, lambda values: list(values.unbind())]
    for kind in kinds:
        source = FunctionRewards([lambda p, c, k=kind: k(torch.tensor([len(t) * 1.0 for t in c]))], tokenizer)
        rewards = source(batch)
        assert torch.equal(rewards, lengths.unsqueeze(-1))
        assert not rewards.requires_grad


def test_load_functions():
    assert load_functions(["math:sqrt"])[0](9) == 3
    for spec in ("math:no_such", "no_such_module:f", "math"):
        with pytest.raises(UserError, match=r"module:function"):
            load_functions([spec])
    with pytest.raises(UserError, match="no world file"):
        load_functions(["nowhere/world.json"])


def test_a_folder_without_reward_heads_is_refused(tiny_model):
    """A causal language model would be scored by heads drawn at random."""
    with pytest.raises(UserError, match="holds no reward head"):
        RewardMixture.from_pretrained(tiny_model)
