"""The stages before the policy: supervised fine-tuning and the reward mixture."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.trainers import sft as sft_module
from torchrl_maxmin.trainers.reward import RewardConfig, run_reward, user_accuracy
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import sample_reviews


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def texts(tmp_path):
    rows = [{"prompt": p, "completion": c} for p, c in sample_reviews(40, 0)]
    return write(tmp_path / "sft.jsonl", rows)


def sft_config(tiny_model, texts, tmp_path, **settings):
    base = {"max_steps": 5, "per_device_train_batch_size": 20, "learning_rate": 1e-2, "device": "cpu"}
    return SFTConfig(tiny_model, texts, str(tmp_path / "sft"), **(base | settings))


def test_half_precision_weights_are_not_trained_as_they_are(tiny_model, texts, tmp_path):
    config = sft_config(tiny_model, texts, tmp_path, dtype="bfloat16")
    with pytest.raises(UserError, match="loses small steps; give --dtype float32"):
        run_sft(config)
    assert not Path(config.output_dir).exists()


def plain_loss(folder, path):
    """Mean negative log-likelihood a text, one at a time."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    losses = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        words = f"{row['prompt']} {row['completion']}".strip()
        ids = torch.tensor([[*tokenizer(words).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def test_five_steps_lower_the_loss_and_save_a_model(tiny_model, texts, tmp_path):
    folder = run_sft(sft_config(tiny_model, texts, tmp_path))
    assert plain_loss(folder, texts) < plain_loss(tiny_model, texts) - 0.3
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (resolved["max_steps"], resolved["learning_rate"]) == (5, 1e-2)
    assert SFTConfig(**resolved).dataset_name == texts


def test_sft_is_a_function_of_its_seed(tiny_model, texts, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)
        (tmp_path / name).mkdir()
        folder = run_sft(sft_config(tiny_model, texts, tmp_path / name, max_steps=2, seed=seed))
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.6, 2), (2, 4)])
def test_epochs_are_rounded_up_to_steps(tiny_model, texts, tmp_path, monkeypatch, epochs, steps):
    """40 rows, 20 a step; transformers would read 0 steps as 3 epochs."""
    totals = []

    def keep(name, optimizer, warmup_steps, total):
        totals.append(total)
        raise InterruptedError

    monkeypatch.setattr("transformers.get_scheduler", keep)
    with pytest.raises(InterruptedError):
        run_sft(sft_config(tiny_model, texts, tmp_path, max_steps=-1, num_train_epochs=epochs))
    assert totals == [steps]


@pytest.mark.parametrize("schedule", sft_module.SCHEDULES)
def test_schedules(tiny_model, texts, tmp_path, schedule):
    settings = {"lr_scheduler_type": schedule, "max_steps": 2, "warmup_steps": 1}
    assert (run_sft(sft_config(tiny_model, texts, tmp_path, **settings)) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("max_length", "completion_only", "expected"),
    [
        (99, False, "<bos> the film was great <eos>"),
        (99, True, "was great <eos>"),
        (5, False, "<bos> film was great <eos>"),
        (4, True, "was great <eos>"),  # the prompt lost two of its three tokens
        (2, True, "<eos>"),
    ],
)
def test_which_tokens_are_learned(
    tiny_model, tmp_path, monkeypatch, tokenizer, max_length, completion_only, expected
):
    path = write(tmp_path / "one.jsonl", [{"prompt": "the film", "completion": "was great"}] * 2)
    seen = {}

    def keep(config, model, rows, collate, device):
        longer = {"input_ids": [5] * 9, "skip": 0}
        seen.update(collate([rows[0], longer]))

    monkeypatch.setattr(sft_module, "train_language_model", keep)
    run_sft(
        sft_config(tiny_model, path, tmp_path, max_length=max_length, completion_only_loss=completion_only)
    )
    labels = seen["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == expected
    kept = seen["input_ids"][0][seen["attention_mask"][0].bool()]
    assert len(kept) == min(max_length, 6)
    assert tokenizer.decode(kept).endswith("was great <eos>"[-5:])
    assert (seen["labels"][1] == 5).all()


ASK, ANSWER = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "film"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "film", "text": "x"}, ("a", "film")),
        ({"text": "a film"}, ("", "a film")),
        ({"prompt": "a", "chosen": "film", "rejected": "song"}, ("a", "film")),
        ({"prompt": ASK, "completion": ANSWER}, (ASK, ANSWER)),
        ({"messages": ASK + ANSWER}, (ASK, ANSWER)),
        ({"prompt": ASK, "completion": "film"}, (ASK, ANSWER)),
        ({"prompt": "a", "chosen": ASK + ANSWER}, (ASK, ANSWER)),  # a conversation that repeats its prompt
        ({"messages": ANSWER + ASK + ANSWER}, (ANSWER + ASK, ANSWER)),
        ({"messages": ASK + ANSWER + ANSWER}, (ASK, ANSWER + ANSWER)),
    ],
)
def test_columns_of_texts(tiny_model, tmp_path, row, expected):
    path = write(tmp_path / "rows.jsonl", [row])
    found = sft_module._read_texts(sft_config(tiny_model, path, tmp_path))
    assert found == ([expected[0]], [expected[1]])


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"messages": ASK + ANSWER}, {"messages": ASK}], "row 1: column 'messages' .* does not end with"),
        ([{"messages": ANSWER}], "row 0: column 'messages' holds a conversation that does not end with"),
        ([{"text": ASK + ANSWER}, {"text": ASK + ANSWER + ASK}], "row 1: column 'text' .* does not end with"),
        ([{"messages": ["a", *ANSWER]}], "line 1: column 'messages' holds parts of different types"),
        ([{"prompt": "a", "completion": ASK}], "row 0: the conversations do not part"),
        ([{"text": "a"}, {"text": ASK}], "column 'text' holds text .line 1. and a list .line 2."),
        ([{"prompt": "a", "chosen": "b"}, {"prompt": ASK, "chosen": "b"}], "column 'prompt' holds text"),
        ([], "no rows to train on"),
    ],
)
def test_texts_that_are_no_training_texts(tiny_model, tmp_path, rows, line):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=line):
        sft_module._read_texts(sft_config(tiny_model, path, tmp_path))


def test_sft_mistakes(tiny_model, texts, tmp_path):
    path = write(tmp_path / "odd.jsonl", [{"review": "x"}])
    with pytest.raises(UserError, match=r"needs columns prompt and completion.*found review"):
        run_sft(sft_config(tiny_model, path, tmp_path))
    with pytest.raises(UserError, match="no model at 'no/such'"):
        run_sft(sft_config("no/such", texts, tmp_path))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run_sft(sft_config(tiny_model, texts, tmp_path))
    assert (tmp_path / "sft" / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ten users; six pick the longer text, four the shorter."""
    rows = []
    for i, (prompt, rest) in enumerate(sample_reviews(120, seed=1)):
        words, user = f"{prompt} {rest}".split(), i % 10
        longer, shorter = " ".join(words), " ".join(words[: len(words) // 2])
        chosen, rejected = (longer, shorter) if user < 6 else (shorter, longer)
        group = "long" if user < 6 else "short"
        rows.append({"prompt": "", "chosen": chosen, "rejected": rejected, "worker": user, "group": group})
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def reward_config(tiny_model, pairs, tmp_path, **settings):
    base = {
        "num_groups": 2, "num_rounds": 1, "steps_per_round": 15, "learning_rate": 2e-3,
        "head_learning_rate": 1e-2,
        "num_restarts": 2, "device": "cpu", "per_device_train_batch_size": 32,
    }  # fmt: skip
    return RewardConfig(tiny_model, pairs, str(tmp_path / "reward"), **(base | settings))


def test_reward_stage_writes_a_model_groups_and_figures(tiny_model, pairs, tmp_path):
    folder = run_reward(reward_config(tiny_model, pairs, tmp_path, heldout_fraction=0.25))
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 2
    with (folder / "groups.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["user"]) for row in rows) == list(range(10))
    for row in rows:
        r = [float(row["responsibility_0"]), float(row["responsibility_1"])]
        assert sum(r) == pytest.approx(1.0, abs=1e-5)
        assert int(row["group"]) == r.index(max(r))
    figures = json.loads((folder / "summary.json").read_text())
    assert figures["num_groups"] == 2
    assert figures["user_accuracy"] >= 0.8
    assert figures["heldout"]["pairs"] == 30
    assert sum(figures["users"]) == 10
    assert figures["mixing_weights"][0] >= figures["mixing_weights"][1]
    assert set(figures["head_of_group"]) == {"long", "short"}
    assert "choice" not in figures
    assert_left_out_and_wants_are_told(figures)
    assert RewardConfig(**yaml.safe_load((folder / "config.yaml").read_text())).num_groups == 2


def assert_left_out_and_wants_are_told(figures):
    """Ten users gave twelve judgements each, a quarter of which was held out before anything else."""
    left_out = figures["left_out"]
    assert left_out["users"] == {"count": 10, "parts": 4}
    assert left_out["judgements"] == {"count": 90, "users": 10, "parts": 5, "reason": None}
    pairs = {"count": 30, "judgements": 30, "users": 10, "reason": None}
    assert left_out["pairs"] == pairs | {"origin": "25% of each user's, rounded down"}
    assert left_out["prompts"] == {"reason": "there are no prompts"}
    assert "repeat" in left_out["items"]["reason"]
    assert all(line in figures["report"] for line in left_out["report"])
    longer = figures["head_of_group"]["long"]
    for k, group in enumerate(figures["wants"]):
        for pair in group["pairs"]:
            assert pair["group"] > pair["others"]
            more = len(pair["preferred"].split()) - len(pair["other"].split())
            assert (more > 0) == (k == longer)
    assert "what each group wants beside the others, by these rewards" in figures["report"]
    assert f"group {longer} prefers '" in figures["report"]


def test_reward_stage_by_one_group_and_an_evaluation_file(tiny_model, pairs, tmp_path):
    config = reward_config(
        tiny_model, pairs, tmp_path, num_groups="1", steps_per_round=1, eval_dataset_name=pairs
    )
    figures = json.loads((run_reward(config) / "summary.json").read_text())
    assert figures["mixing_weights"] == [pytest.approx(1.0)]
    assert figures["heldout"]["pairs"] == 120
    assert figures["left_out"]["pairs"]["origin"] == pairs
    assert figures["wants"] is None


def test_accumulated_batches_train_as_one_and_scoring_batches_change_nothing(tiny_model, pairs, tmp_path):
    figures, few = [], {"steps_per_round": 4, "calibration_prompts": 20, "response_length": 4}
    for name, batches in {
        "whole": {"per_device_train_batch_size": 24},
        "parts": {
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 4,
            "scoring_batch_size": 7,
        },
    }.items():
        config = reward_config(tiny_model, pairs, tmp_path / name, calibration="none", **(few | batches))
        figures.append(json.loads((run_reward(config) / "summary.json").read_text()))
    whole, parts = figures
    assert parts["history"][0]["loss"] == pytest.approx(whole["history"][0]["loss"], rel=1e-3)
    assert parts["heldout"]["log_likelihood"] == pytest.approx(whole["heldout"]["log_likelihood"], rel=1e-3)
    assert parts["mixing_weights"] == pytest.approx(whole["mixing_weights"], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1"),
        ({"scoring_batch_size": 0}, "--scoring_batch_size must be at least 1"),
        ({"num_groups": "many"}, "--num_groups is a positive number or auto, not 'many'"),
        ({"num_groups": 0}, "--num_groups is a positive number"),
        ({"num_groups": 11}, "11 is more than the 10 users"),
        ({"assignment": "firm"}, "--assignment 'firm' is none of soft, hard"),
        ({"user_column": "who"}, "who.*found"),
        ({"model_name_or_path": "no/such"}, "no model at 'no/such'"),
        ({"eval_dataset_name": "no/such.jsonl"}, "cannot read data"),
    ],
)
def test_reward_mistakes_before_any_work(tiny_model, pairs, tmp_path, settings, message):
    config = reward_config(tiny_model, pairs, tmp_path)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        run_reward(config)
    assert not (tmp_path / "reward").exists()


def test_user_accuracy_is_balanced_and_matched():
    groups = ["a"] * 8 + ["b"] * 2
    found = torch.tensor([1] * 7 + [0] + [0, 1])
    accuracy, heads = user_accuracy(torch.nn.functional.one_hot(found, 2).float(), groups)
    assert accuracy == pytest.approx((7 / 8 + 1 / 2) / 2)
    assert heads == {"a": 1, "b": 0}
    one, heads = user_accuracy(torch.ones(10, 1), groups)
    assert one == pytest.approx(0.5)
    assert heads == {"a": 0}
    three, _ = user_accuracy(torch.eye(3)[[0] * 5 + [2] * 3 + [1] * 2], groups)
    assert three == pytest.approx((5 / 8 + 1) / 2)


def test_reward_folder_is_calibrated_on_samples_of_its_trunk(tiny_model, pairs, tmp_path):
    """The heads of a saved mixture have mean 0 over reference samples, so their minimum means something."""
    few = {"steps_per_round": 2, "response_length": 6}
    folder = run_reward(reward_config(tiny_model, pairs, tmp_path, **few))
    mixture = RewardMixture.from_pretrained(folder)
    assert mixture.calibration.method == "sft_std"
    assert (mixture.calibration.scale > 0).all()
    assert not torch.equal(mixture.calibration.shift, torch.zeros(mixture.num_groups))
    (tmp_path / "raw").mkdir()
    raw = run_reward(reward_config(tiny_model, pairs, tmp_path / "raw", calibration="none", **few))
    assert RewardMixture.from_pretrained(raw).calibration.method == "none"
