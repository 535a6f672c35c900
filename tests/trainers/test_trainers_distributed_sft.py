"""Several processes fine-tune what one does, and what the Trainer of transformers does in one."""

import dataclasses
import json
from pathlib import Path

import pytest
from ranks import assert_same_parameters, on_ranks
from transformers import AutoModelForCausalLM

from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world.world import sample_reviews

ROWS = 63


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of ragged length, so that a mean of each process's own tokens would be another."""
    rows = [{"prompt": prompt, "completion": rest} for prompt, rest in sample_reviews(ROWS, 0)]
    for row in rows[::3]:
        row["completion"] = row["completion"].split()[0]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tune_all(configs):
    for values in configs:
        run_sft(SFTConfig(**values))


CASES = {
    "epochs": {"num_train_epochs": 2.0, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
    "completions": {"max_steps": 5, "completion_only_loss": True, "weight_decay": 0.1, "warmup_steps": 2},
    "checkpointing": {"max_steps": 2, "gradient_checkpointing": True, "optim": "adamw_torch"},
    # a last batch of one row, which one of two processes reads again for nothing
    "one_left": {"num_train_epochs": 1.0, "batch": 62},
    "adapters": {"max_steps": 3, "use_peft": True, "lora_r": 4},
}


def run_on_ranks(world, mode, cases, tiny_model, texts, folder):
    """Run cases with batches of 16 rows; returns their folders."""
    configs = {}
    for name, case in cases.items():
        values = {"learning_rate": 3e-4, "device": "cpu", "distributed": mode} | case
        size = values.pop("batch", 16) // world // values.get("gradient_accumulation_steps", 1)
        where = str(folder / f"{mode}-{world}" / name)
        configs[name] = SFTConfig(tiny_model, texts, where, per_device_train_batch_size=size, **values)
    on_ranks(world, tune_all, [dataclasses.asdict(config) for config in configs.values()])
    return {name: Path(config.output_dir) for name, config in configs.items()}


def assert_same_model(found, expected, bar=1e-4, counted_alike=True):
    assert_same_parameters(found / "model.safetensors", expected / "model.safetensors", bar)
    if not counted_alike:
        return
    losses = [json.loads((path / "summary.json").read_text())["train_loss"] for path in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=bar)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def on_one(tiny_model, texts, folder):
    return run_on_ranks(1, "ddp", CASES, tiny_model, texts, folder)


@pytest.mark.parametrize(
    "settings", [{}, {"completion_only_loss": True, "weight_decay": 0.1, "warmup_steps": 2}]
)
def test_its_steps_are_the_trainers(tiny_model, texts, tmp_path, settings):
    """On batches of all rows, whose order is nothing.

    The Trainer divides by all tokens of a text, its first too, which nothing predicts.
    """
    case = {"whole": {"batch": ROWS, "max_steps": 4, **settings}}
    folders = [run_on_ranks(1, mode, case, tiny_model, texts, tmp_path)["whole"] for mode in ("ddp", "none")]
    assert_same_model(*folders, counted_alike="completion_only_loss" in settings)


def test_two_copies_learn_what_one_learns(on_one, tiny_model, texts, folder):
    for name, found in run_on_ranks(2, "ddp", CASES, tiny_model, texts, folder).items():
        assert_same_model(found, on_one[name])


def test_two_parts_learn_what_one_learns(on_one, tiny_model, texts, folder):
    for name, found in run_on_ranks(2, "fsdp2", CASES, tiny_model, texts, folder).items():
        assert_same_model(found, on_one[name])
        model = AutoModelForCausalLM.from_pretrained(found)
        assert model.lm_head.weight is model.transformer.wte.weight
        sizes = [(path / "model.safetensors").stat().st_size for path in (found, on_one[name])]
        assert sizes[0] == sizes[1]  # the tied weights are there once
