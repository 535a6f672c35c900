"""Plans: parts against arithmetic by hand, what never falls, what is refused, what would fit."""

import json
from dataclasses import replace

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.trainers.plan import GB, PlanConfig, make_plan
from torchrl_maxmin.trainers.plan_networks import Network, size_of
from torchrl_maxmin.trainers.plan_phases import stage_phases
from torchrl_maxmin.trainers.plan_traces import Planner

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LORA = {"use_peft": True, "lora_r": 4}
SHORT = {"max_prompt_length": 8, "response_length": 8, "calibration_prompts": 8}


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """A folder with a config and nothing else."""
    folder = tmp_path_factory.mktemp("config_only")
    transformers.LlamaConfig(**LLAMA).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def planner():
    return Planner("cuda", None, {})


def phases_of(model, planner, **flags):
    config = PlanConfig(model, **{"num_groups": 2, **SHORT, **flags})
    config.check()
    return {phase.name: phase for phase in stage_phases(config.resolved(), planner)}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_full_copies_weigh_what_they_have(config_only, planner):
    """Policy, reference, the critic's trunk; gradients and two moments of what is trained."""
    config = transformers.LlamaConfig(**LLAMA)
    policy = parameters(transformers.LlamaForCausalLM(config))
    trunk = parameters(transformers.LlamaModel(config))
    phases = phases_of(config_only, planner, num_groups=3, reward_funcs=["a"])
    parts, heads = phases["save"].parts, 4 * (32 + 1)
    rope = 2 * 4 * 4  # the tables of frequencies: buffers, not parameters
    assert parts["policy weights"] == pytest.approx(4 * policy, abs=rope)
    assert parts["reference weights"] == parts["policy weights"]
    assert parts["critic weights"] == pytest.approx(4 * trunk, abs=rope)
    assert parts["value heads"] == 4 * heads
    assert parts["gradients"] == 4 * (policy + trunk + heads)
    assert parts["Adam states"] == 2 * parts["gradients"]
    assert "reward model" not in parts
    with_model = phases_of(config_only, planner)["save"].parts
    assert with_model["reward model"] == parts["critic weights"]


def test_adapters_weigh_their_two_matrices(config_only, planner):
    layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)  # q, o; k, v; gate, up, down
    adapter = 4 * 4 * layer  # of rank 4, on 4 layers
    parts = phases_of(config_only, planner, **LORA, dtype="bfloat16")["save"].parts
    assert parts["adapters"] == 2 * 4 * adapter
    assert parts["gradients"] == 4 * (2 * adapter + 3 * (32 + 1))
    assert parts["trunk weights"] == pytest.approx(
        2 * parameters(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))), abs=32
    )
    one = phases_of(config_only, planner, **LORA, critic="heads")["save"].parts
    assert one["adapters"] == 4 * adapter
    none = phases_of(config_only, planner, **LORA, advantage="grpo")["save"].parts
    assert none["gradients"] == 4 * adapter
    assert "value heads" not in none


def test_half_precision_keeps_float32_copies(config_only, planner):
    full = phases_of(config_only, planner)["save"].parts
    half = phases_of(config_only, planner, dtype="bfloat16")["save"].parts
    assert half["Adam states"] == full["Adam states"]
    trained = full["gradients"] / 4 - 3 * 33
    assert half["float32 copies"] == 4 * trained
    assert half["gradients"] == 2 * trained + 4 * 3 * 33


def test_a_saved_mixture_is_read_off_its_folder(config_only, tiny_model, tmp_path, planner):
    from torchrl_maxmin.rewards import RewardMixture

    RewardMixture.from_backbone(tiny_model, 3, use_peft=True, lora_r=2).save_pretrained(tmp_path)
    parts = phases_of(config_only, planner, reward_model_path=str(tmp_path))["save"].parts
    trunk = size_of(Network(tiny_model, "trunk")).weights
    adapters = sum(file.stat().st_size for file in tmp_path.glob("adapters/*/*.safetensors"))
    assert adapters > 0
    assert parts["reward model"] == trunk + adapters + (tmp_path / "heads.safetensors").stat().st_size


def test_a_reward_on_the_policys_trunk_weighs_what_is_added(config_only, tiny_model, tmp_path, planner):
    """An adapter and a head a group, in float32; the trunk once."""
    layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
    parts = phases_of(config_only, planner, **LORA, num_groups=3, dtype="bfloat16")["save"].parts
    assert parts["reward adapters and heads"] == 3 * 4 * (4 * 4 * layer + 32)
    assert "reward model" not in parts
    own = phases_of(config_only, planner, **LORA, num_groups=3, dtype="bfloat16", share_reward_trunk=False)
    trunk = parameters(transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)))
    assert own["save"].parts["reward model"] == pytest.approx(4 * trunk, abs=32)
    rest = {name: size for name, size in own["save"].parts.items() if name != "reward model"}
    assert parts == rest | {"reward adapters and heads": parts["reward adapters and heads"]}


def test_a_saved_reward_on_the_policys_trunk_is_told_by_its_config(tiny_model, make_model, tmp_path, planner):
    from torchrl_maxmin.rewards import RewardMixture

    adapted = RewardMixture.from_backbone(tiny_model, 3, use_peft=True, lora_r=2)
    adapted.save_pretrained(tmp_path / "adapted")
    RewardMixture.from_backbone(tiny_model, 3).save_pretrained(tmp_path / "whole")
    other = make_model("deeper", n_layer=3)
    short = {"max_prompt_length": 4, "response_length": 4}

    def held(model, name, **flags):
        path = str(tmp_path / name)
        return phases_of(model, planner, reward_model_path=path, num_groups=3, **short, **flags)["save"].parts

    files = [*(tmp_path / "adapted").glob("adapters/*/*.safetensors"), tmp_path / "adapted/heads.safetensors"]
    assert len(files) == 4
    added = sum(file.stat().st_size for file in files)
    assert held(tiny_model, "adapted", **LORA)["reward adapters and heads"] == added
    trunk = size_of(Network(tiny_model, "trunk")).weights
    for model, name, flags, weight in (
        (other, "adapted", LORA, trunk + added),
        (tiny_model, "adapted", {}, trunk + added),
        (tiny_model, "adapted", {**LORA, "share_reward_trunk": False}, trunk + added),
        (tiny_model, "whole", LORA, trunk),
    ):
        parts = held(model, name, **flags)
        assert parts["reward model"] == weight
        assert "reward adapters and heads" not in parts


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_more_is_never_less(config_only, planner, data):
    """Rows, tokens and groups: no phase and no part falls when one of them rises."""
    sizes = {
        "rollout_batch_size": data.draw(st.sampled_from([4, 8])),
        "mini_batch_size": data.draw(st.sampled_from([2, 4])),
        "response_length": data.draw(st.sampled_from([4, 9])),
        "max_prompt_length": data.draw(st.sampled_from([3, 8])),
        "num_groups": data.draw(st.sampled_from([1, 3])),
    }
    kind = data.draw(st.sampled_from([{}, LORA, {"advantage": "rloo"}, {**LORA, "critic": "heads"}]))
    flag = data.draw(st.sampled_from(list(sizes)))
    before = phases_of(config_only, planner, **kind, **sizes)
    after = phases_of(config_only, planner, **kind, **{**sizes, flag: 2 * sizes[flag]})
    for name, phase in before.items():
        assert after[name].total >= phase.total, (flag, name)


@pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "lora"])
def test_what_saves_memory_saves_memory(config_only, planner, kind):
    sizes = {"mini_batch_size": 16, "rollout_batch_size": 32, "max_prompt_length": 64, "response_length": 32}
    plain = phases_of(config_only, planner, **kind, **sizes)
    for flags in (
        {"per_device_train_batch_size": 4},
        {"gradient_checkpointing": True},
        {"advantage": "rloo"},
    ):
        less = phases_of(config_only, planner, **kind, **sizes, **flags)
        assert less["update"].total < plain["update"].total, flags
    for flag, phase in (("scoring_batch_size", "score"), ("generation_batch_size", "generate")):
        few = phases_of(config_only, planner, **kind, **{**sizes, "rollout_batch_size": 128, flag: 8})
        many = phases_of(config_only, planner, **kind, **{**sizes, "rollout_batch_size": 128})
        assert few[phase].total < many[phase].total


def test_shards_are_shares(config_only, planner):
    alone = phases_of(config_only, planner)["save"].parts
    copies = phases_of(config_only, planner, gpus=4)["save"].parts
    shards = phases_of(config_only, planner, gpus=4, distributed="fsdp2")["save"].parts
    assert copies["policy weights"] == alone["policy weights"] == 4 * shards["policy weights"]
    heads = 4 * 3 * (32 + 1)  # a copy in every process
    for name, times in (("gradients", 1), ("Adam states", 2)):
        assert copies[name] == alone[name]
        assert alone[name] - times * heads == 4 * (shards[name] - times * heads)


def test_adapters_are_no_shards(config_only, planner):
    alone = phases_of(config_only, planner, **LORA)["update"].parts
    shards = phases_of(config_only, planner, **LORA, gpus=4, distributed="fsdp2")["update"].parts
    output = 4 * 96 * 32  # which log-probabilities read
    assert alone["trunk weights"] - output == 4 * (shards["trunk weights"] - output)
    for name in ("adapters", "gradients", "Adam states", "value heads"):
        assert shards[name] == alone[name], name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"gpus": 0}, "--gpus must be at least 1"),
        ({"num_groups": 0}, "--num_groups must be at least 1"),
        ({"num_groups": None}, "needs --num_groups"),
        ({"stage": "evaluate"}, "--stage 'evaluate' is none of"),
        ({"critic": "adapter"}, "goes with --use_peft"),
        ({"lora_r": 8}, "go with --use_peft"),
        ({"max_length": 8}, "--max_length says nothing about --stage ppo"),
        ({"advantage": "rloo", "critic": "full"}, "leave --critic out"),
        ({"memory_gb": -1.0}, "--memory_gb must be positive"),
        ({"gpus": 2, "distributed": "none"}, "give --gpus 1"),
        ({"network_gb_per_s": 1.0}, "--gpus 2 or more"),
        ({"response_length": 600}, "positions"),
        ({"reward_funcs": ["a"], "reward_model_path": "b"}, "either"),
    ],
)
def test_refuses(config_only, flags, words):
    with pytest.raises(UserError, match=words):
        make_plan(PlanConfig(config_only, **{"num_groups": 2, **flags}))


@pytest.mark.slow
def test_advice_is_found_by_planning_again(config_only):
    sizes = {"mini_batch_size": 64, "rollout_batch_size": 64, "max_prompt_length": 128, "response_length": 64}
    config = PlanConfig(config_only, 2, **sizes, calibration_prompts=16, reward_funcs=["a"])
    plan = make_plan(config)
    assert plan.fits
    assert plan.worst.name == "update"
    smaller = replace(config, memory_gb=(plan.worst.total - 5e6) / GB)
    short = make_plan(smaller)
    assert not short.fits
    assert {"gradient_checkpointing": True} in [flags for flags, _ in short.advice]
    for flags, peak in short.advice:
        again = make_plan(replace(smaller, **flags))
        assert again.fits, flags
        assert again.worst.total == pytest.approx(peak)
    (micro,) = (
        flags["per_device_train_batch_size"]
        for flags, _ in short.advice
        if list(flags) == ["per_device_train_batch_size"]
    )
    assert not make_plan(replace(smaller, per_device_train_batch_size=2 * micro)).fits
    hopeless = make_plan(replace(config, memory_gb=0.5))
    assert not hopeless.fits
    assert hopeless.advice == []


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_other_stages_have_plans(config_only, planner, stage):
    flags = {"stage": stage, "max_length": 16, "per_device_train_batch_size": 2}
    if stage == "sft":
        config = PlanConfig(config_only, **flags)
    else:
        config = PlanConfig(config_only, num_groups=3, scoring_batch_size=4, **SHORT, **flags)
    config.check()
    plain = {phase.name: phase for phase in stage_phases(config.resolved(), planner)}
    assert plain["update"].total > plain["save"].total
    again = replace(config, gradient_checkpointing=True)
    less = {phase.name: phase for phase in stage_phases(again.resolved(), planner)}
    assert less["update"].total <= plain["update"].total
    adapted = replace(config, **LORA)
    lora = {phase.name: phase for phase in stage_phases(adapted.resolved(), planner)}
    assert lora["update"].parts["gradients"] < plain["update"].parts["gradients"]
    if stage == "reward":
        shared = replace(adapted, adapters="shared")
        once = {phase.name: phase for phase in stage_phases(shared.resolved(), planner)}
        assert lora["update"].parts["activations"] > 2 * once["update"].parts["activations"]
        assert "reference weights" in plain["calibrate"].parts


def test_the_command_writes_what_it_prints(config_only, tmp_path, capsys):
    flags = ["--model_name_or_path", config_only, "--num_groups", "2", "--gpus", "1"]
    flags += ["--max_prompt_length", "8", "--response_length", "8", "--calibration_prompts", "4"]
    assert main(["plan", *flags, "--output_dir", str(tmp_path / "plan")]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "plan" / "summary.json").read_text())
    assert (
        f"peak {summary['peak']['bytes'] / GB:.2f} GB, in {summary['peak']['phase']}: fits --gpus 1 of 80 GB"
        in out
    )
    for phase in summary["phases"].values():
        assert phase["bytes"] == pytest.approx(sum(phase["parts"].values()))
    assert all(rate > 0 for rate in summary["rates"]["flops"].values())
    assert summary["phases"]["update"]["seconds"] > 0
    assert main(["plan", *flags, "--device", "cpu"]) == 0
    assert "libraries" in capsys.readouterr().out
    assert main(["plan", *flags, "--gpu", "1"]) == 2
    assert "unknown flag --gpu; did you mean --gpus?" in capsys.readouterr().err


@pytest.mark.parametrize("reward", ["functions", "on the trunk", "by itself"])
def test_the_7b_width_fits_40_gb_with_adapters(tmp_path, reward):
    """32 layers of 4096 x 11008, four groups, 512 + 512 tokens, in bfloat16; no second trunk."""
    transformers.LlamaConfig().save_pretrained(tmp_path)  # that of the first 7B
    config = PlanConfig(
        str(tmp_path),
        4,
        use_peft=True,
        dtype="bfloat16",
        gradient_checkpointing=True,
        per_device_train_batch_size=4,
        generation_batch_size=16,
        scoring_batch_size=8,
        max_prompt_length=512,
        response_length=512,
        reward_funcs=["length"] if reward == "functions" else None,
        share_reward_trunk=reward != "by itself",
    )
    plan = make_plan(config)
    assert plan.parameters == 6_738_415_616
    assert (plan.worst.total < 40 * GB) == (reward != "by itself"), plan.to_dict()["phases"]
    if reward == "on the trunk":
        (added,) = {phase.parts["reward adapters and heads"] for phase in plan.phases}
        assert added < 0.7 * GB
