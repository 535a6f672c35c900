"""The loop by hand computes what the package does, contestants take turns, and medians have honest ends."""

import io
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONTESTANTS = str(BENCHMARKS / "contestants")
if CONTESTANTS not in sys.path:
    sys.path.append(CONTESTANTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    """Folder of a tiny Llama whose logits are far from uniform, and of prompts of several lengths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchrl_maxmin.world import sample_prompts

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": text} for text in sample_prompts(12, 0, heldout=False)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def settings(llama):
    return {
        "model_name_or_path": str(llama),
        "dataset_name": str(llama / "prompts.jsonl"),
        "rollout_batch_size": 8,
        "mini_batch_size": 4,
        "num_ppo_epochs": 1,
        "response_length": 6,
        "num_generations": 2,
        "lora_r": 4,
        "learning_rate": 1e-3,
        "beta": 0.1,
        "threads": 1,
    }


@pytest.fixture
def both(settings, tmp_path):
    """The package's parts and the loop by hand, with the same adapters and heads, far from those at first."""
    from contestant import package_config, texts
    from plain_ppo import PlainPPO, PlainSettings
    from race_rewards import short, vowels

    from torchrl_maxmin.trainers.lm_ppo import build_ppo

    parts = build_ppo(package_config(settings, tmp_path / "run"))
    given = PlainSettings(**{k: v for k, v in settings.items() if k in PlainSettings.__dataclass_fields__})
    plain = PlainPPO(settings["model_name_or_path"], texts(settings), [short, vowels], given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameters in parts.models.parameters().values():
            for parameter in parameters:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        own = dict(plain.model.named_parameters())
        for name, parameter in parts.models.adapted.named_parameters():
            own[name].copy_(parameter)
        plain.heads.load_state_dict(parts.models.critic.head.state_dict())
    parts.advantages.fresh = False  # the check that the policy is the reference still
    return parts, plain


def batch_of(rollout, tokenizer):
    """A rollout of the package as the loop by hand reads it."""
    batch = {name: rollout[name] for name in ("prompt_tokens", "prompt_mask", "action", "action_mask")} | {
        "row": rollout["prompt_index"],
        "log_prob": rollout["sample_log_prob"],
    }
    assert not batch["action_mask"].all()  # some responses end early
    assert not batch["prompt_mask"].all()
    return batch


def test_the_loop_by_hand_has_the_packages_advantages_losses_and_gradients(both, tokenizer):
    parts, plain = both
    torch.manual_seed(3)
    rollout = parts.statistics(next(iter(parts.rollouts)))
    rows, _ = parts.advantages(rollout)
    batch = batch_of(rollout, tokenizer)
    with torch.no_grad():
        batch["ref_log_prob"], batch["value"] = plain.reference_log_probs(batch), plain.values_of(batch)
    plain.advantages(batch, rollout["next", "reward"], rollout["group_weights"][0])
    mask = batch["action_mask"]
    same = {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in (
        (rows["ref_log_prob"], batch["ref_log_prob"]),
        (rows["state_value"], batch["value"]),
        (rows["value_target"], batch["value_target"]),
        (rows["advantage"][..., 0], batch["advantage"]),
    ):
        torch.testing.assert_close(ours[mask], theirs[mask], **same)

    # an older policy: ratios are not 1, and some are clipped
    older = 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    rows["sample_log_prob"] = batch["log_prob"] = batch["log_prob"] + older * mask
    losses = parts.learner.accumulate(rows)
    loss, metrics = plain.policy_loss(batch)
    loss.backward()
    value_loss = plain.value_loss(batch)
    value_loss.backward()
    torch.testing.assert_close(losses["loss_objective"], loss.detach(), **same)
    torch.testing.assert_close(losses["loss_critic"], value_loss.detach(), **same)
    torch.testing.assert_close(losses["clip_fraction"], metrics["clipfrac"])
    assert 0 < float(metrics["clipfrac"]) < 1
    gradients = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in parts.models.adapted.named_parameters() if p.requires_grad}
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(parts.models.critic.head.weight.grad, plain.heads.weight.grad, **same)


def test_the_loop_by_hand_samples_with_the_log_probabilities_that_it_trains(both):
    _, plain = both
    torch.manual_seed(0)
    batch = plain.sample()
    with torch.no_grad():
        scored = plain.log_probs(batch)
    mask = batch["action_mask"]
    torch.testing.assert_close(scored[mask], batch["log_prob"][mask], rtol=1e-4, atol=1e-5)


def test_the_loop_by_hand_moves_both_adapters_and_no_weight_of_the_trunk(both):
    _, plain = both
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    metrics = plain.iterate()
    assert all(math.isfinite(value) for value in metrics.values())
    moved = {name for name, p in plain.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_rollouts_wait_for_their_turn(monkeypatch, capsys):
    from contestant import ANSWER, Finished, PacedRollouts, Turns

    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    drawn, rollouts = [], PacedRollouts(iter([10, 20, 30]), Turns())
    with pytest.raises(Finished):
        drawn.extend(rollouts)
    assert drawn == [10, 20]
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith(ANSWER)]
    assert len(answers) == 2
    assert set(json.loads(answers[0].removeprefix(ANSWER))) == {"wall", "processor"}


def test_a_median_has_the_order_statistics_that_cover_it(facts):
    median_interval = facts.median_interval
    found = median_interval([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 9.0, 7.0, 8.0])
    # sign test: 2 * (1 + 9) / 2^9 is below .05, with the third value of each end it is not
    assert (found["median"], found["low"], found["high"]) == (5.0, 2.0, 8.0)
    assert found["confidence"] == 1 - 2 * (1 + 9) / 2**9
    few = median_interval([1.0, 2.0, 4.0])
    assert (few["low"], few["high"], few["confidence"]) == (1.0, 4.0, 0.75)  # says that it is short
    assert median_interval([2.0])["median"] == 2.0


def test_the_interval_covers_the_median_as_often_as_it_says(facts):
    median_interval = facts.median_interval
    draws = np.random.default_rng(0).exponential(size=(4000, 8))
    intervals = [median_interval(row.tolist()) for row in draws]
    covered = statistics.mean(i["low"] <= math.log(2) <= i["high"] for i in intervals)
    assert abs(covered - intervals[0]["confidence"]) < 4 * math.sqrt(0.01 / 4000) * 2


def test_without_trl_it_says_what_is_missing(llama, tmp_path):
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'trl' else find(name, *rest)\n"
    )
    script = BENCHMARKS / "adapters.py"
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(script), "--model_name_or_path", str(llama), "--output", str(tmp_path / "o")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert result.returncode == 2
    assert "trl==1.16" in result.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_race_against_the_loop_by_hand_writes_its_ratios(llama, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "adapters.py"), "--model_name_or_path", str(llama)]
    command += ["--against", "plain", "--pairs", "2", "--response_length", "6", "--rollout_batch_size", "8"]
    output = tmp_path / "adapters.json"
    result = subprocess.run(
        [*command, "--mini_batch_size", "4", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode in (0, 1), result.stderr[-2000:]
    found = json.loads(output.read_text())
    assert {"processor", "torch", "peft", "trl", "commit"} <= set(found["environment"])
    ours, other = (seconds[1]["wall"] for seconds in found["plain"]["seconds"].values())
    ratio = found["plain"]["ratio"]["wall"]
    assert ratio["low"] <= ours / other <= ratio["high"]
    assert result.returncode == int(ratio["median"] > 1)


def test_bars_of_plans_are_those_of_what_was_measured(plan_script):
    bars = plan_script.bars

    def result(name, planned, measured):
        return {
            "setting": name,
            "planned_bytes": planned,
            "measured_bytes": measured,
            "difference": planned / measured - 1,
        }

    found = bars([result("full", 90.0, 100.0), result("lora, bfloat16", 20.0, 25.0)])
    assert {name: bar["holds"] for name, bar in found.items()} == {
        "plan of full": True,
        "plan of lora, bfloat16": False,
        "lora, bfloat16 over its plan": False,
        "lora, bfloat16 over full": True,
    }
    assert found["lora, bfloat16 over full"]["value"] == 0.25
    assert set(bars([result("lora", 1.0, 1.0)])) == {"plan of lora"}
