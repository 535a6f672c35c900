"""Policy runs whose responses an engine samples: what is logged, and what is left where the engine fails."""

from pathlib import Path

import pytest
import torch
from engine_server import Answers, serving
from engines import CopyEngine
from trainers_runs import PPORun

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.rollouts import settings as settings_module
from torchrl_maxmin.rollouts import vllm as vllm_module
from torchrl_maxmin.trainers import lm_ppo

MISMATCH = [f"rollout/log_prob_mismatch_{name}" for name in ("max", "mean", "kl")]


@pytest.fixture
def engine(monkeypatch):
    """Runs with ``--rollout_engine vllm`` take the engine that this sets."""

    def use(kind):
        monkeypatch.setattr(settings_module, "require_vllm", lambda: None)
        monkeypatch.setattr(lm_ppo, "VLLMEngine", kind)

    return use


class Noisy(CopyEngine):
    """Computes with less than the trainer's precision: by a tenth of a nat a token."""

    def answer(self, prompt, seed):
        sample = super().answer(prompt, seed)
        return type(sample)(sample.tokens, [value - 0.1 for value in sample.log_probs])


class Dying(CopyEngine):
    """Fails at the third batch."""

    def generate(self, prompts, seeds, *, stop_early=True):
        if self.loads > 3:  # the first was before any work
            raise RuntimeError("EngineCore died\nand a traceback of many lines")
        return super().generate(prompts, seeds)


def test_how_far_sampler_and_trainer_are_apart_is_logged_every_iteration(make_config, engine):
    engine(CopyEngine)
    run = PPORun(
        make_config(rollout_engine="vllm", vllm_gpu_memory_utilization=0.25, generation_batch_size=5)
    )
    sampler = run.rollouts.collector.policy
    assert sampler.engine.memory == {
        "gpu_memory_utilization": 0.25,
        "max_num_seqs": 5,
        "max_prompt_length": run.rollouts.prompts["prompt_tokens"].shape[-1],
    }
    run.train()
    rows = read_metrics(run.folder)
    assert len(rows) == sampler.version == 4
    assert all(0 <= row[name] < 1e-4 for row in rows for name in MISMATCH)
    assert (run.folder / "model.safetensors").is_file()


@pytest.mark.parametrize("settings", [{"advantage": "rloo", "num_generations": 2}, {"use_peft": True}])
def test_other_kinds_of_runs(make_config, engine, settings):
    engine(CopyEngine)
    run = PPORun(make_config(rollout_engine="vllm", num_iterations=2, **settings)).train()
    assert [row[MISMATCH[0]] < 1e-4 for row in read_metrics(run.folder)] == [True, True]


@pytest.mark.parametrize(("cap", "weight"), [(None, 1.10517), (1.05, 1.05), (0.0, None)])
def test_a_token_weighs_what_the_trainer_makes_of_it(make_config, engine, cap, weight):
    """All tokens are exp(.1) times as likely to the trainer: they weigh this, or the cap, or 1."""
    engine(Noisy)
    run = PPORun(make_config(rollout_engine="vllm", importance_sampling_cap=cap))
    run.parts.advantages.fresh = False  # what is so far off is refused at first
    batch = run.parts.statistics(next(iter(run.rollouts)))
    rows, metrics = run.parts.advantages(batch)
    assert metrics[MISMATCH[1]] == pytest.approx(0.1, abs=1e-4)
    assert metrics[MISMATCH[2]] == pytest.approx(0.00517, abs=1e-4)  # exp(.1) - 1 - .1
    if weight is None:
        assert torch.equal(rows["sample_log_prob"], batch["sample_log_prob"])
        return
    scored = run.models.log_prob(batch)
    torch.testing.assert_close(rows["sample_log_prob"], scored, atol=1e-5, rtol=0)
    run.parts.advantages.importance_sampling_cap = 0.0
    plain, _ = run.parts.advantages(batch.set("sample_log_prob", scored))
    torch.testing.assert_close(rows["advantage"], plain["advantage"] * weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"use_peft": True, "lora_r": 4}])
def test_an_engine_that_dies_leaves_a_checkpoint_that_goes_on(make_config, engine, settings):
    engine(CopyEngine)
    whole = PPORun(make_config("whole", rollout_engine="vllm", **settings)).train()
    engine(Dying)
    run = PPORun(make_config("parts", rollout_engine="vllm", **settings))
    line = r"sampled nothing \(RuntimeError: EngineCore died\); all updates are in \S+/checkpoint-2: --resume"
    with pytest.raises(EngineError, match=line):
        run.train()
    assert len(read_metrics(run.folder)) == 2
    engine(CopyEngine)
    resumed = PPORun(make_config("parts", rollout_engine="vllm", resume_from_checkpoint="last", **settings))
    assert resumed.start == resumed.rollouts.collector.policy.version == 2
    resumed.train()
    for name in ("metrics.jsonl", "summary.json", "model.safetensors"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes(), name


def test_the_command_ends_in_one_line(make_config, engine, capsys):
    engine(Dying)
    config = make_config("run", rollout_engine="vllm")
    flags = ("model_name_or_path", "dataset_name", "output_dir", "num_iterations", "rollout_batch_size")
    flags += ("mini_batch_size", "response_length", "calibration_prompts", "rollout_engine", "device")
    arguments = [word for name in flags for word in (f"--{name}", str(getattr(config, name)))]
    assert main(["ppo", *arguments, "--reward_funcs", *config.reward_funcs]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("torchrl-maxmin ppo: error: the rollout engine sampled nothing")
    assert last.endswith("--resume_from_checkpoint last goes on from there")


def test_without_vllm_one_line_names_the_extra(make_config, monkeypatch):
    monkeypatch.setattr(vllm_module, "find_spec", lambda name: None)
    config = make_config("run", rollout_engine="vllm")
    with pytest.raises(UserError, match=r"pip install 'torchrl-maxmin\[vllm\]'"):
        PPORun(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rollout_engine": "sglang"}, "--rollout_engine 'sglang' is none of generate, hf, vllm"),
        ({"vllm_gpu_memory_utilization": 0.5}, "is of --rollout_engine vllm: leave it out"),
        ({"rollout_engine": "vllm", "vllm_gpu_memory_utilization": 0.0}, "must be positive"),
        ({"rollout_engine": "vllm", "vllm_gpu_memory_utilization": 1.5}, "between 0 and 1"),
        ({"vllm_server_base_url": "http://host:80"}, "vllm_server_base_url is of --rollout_engine vllm"),
        ({"rollout_engine": "vllm", "vllm_server_base_url": "host:80"}, "must begin with http://"),
        (
            {
                "rollout_engine": "vllm",
                "vllm_server_base_url": "http://h",
                "vllm_gpu_memory_utilization": 0.5,
            },
            "the server's to say",
        ),
        ({"rollout_engine": "vllm", "distributed": "ddp"}, "--distributed: each process"),
        ({"rollout_engine": "vllm", "temperature": 0.001}, "--temperature outside 0.01 to 2"),
        ({"rollout_engine": "vllm", "temperature": 2.5}, "--temperature outside 0.01 to 2"),
        ({"rollout_engine": "vllm", "top_k": 5, "importance_sampling_cap": 2.0}, "what is left out"),
        ({"importance_sampling_cap": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_cannot_be(make_config, engine, settings, words):
    engine(CopyEngine)
    with pytest.raises(UserError, match=words):
        make_config(**settings).check()


def test_a_server_trains_what_the_same_engine_does_in_this_process(make_config, engine, monkeypatch):
    engine(CopyEngine)
    within = PPORun(make_config("within", rollout_engine="vllm")).train()
    monkeypatch.undo()  # a trainer of a server has no vLLM
    answers = Answers(CopyEngine(within.models.reference, within.models.tokenizer))
    with serving(answers) as address:
        config = make_config("served", rollout_engine="vllm", vllm_server_base_url=address)
        served = PPORun(config).train()
    for name in ("metrics.jsonl", "summary.json", "model.safetensors"):
        assert (within.folder / name).read_bytes() == (served.folder / name).read_bytes(), name


def test_hf_is_generate(make_config):
    runs = [
        PPORun(make_config(name, rollout_engine=name, num_iterations=1)).train()
        for name in ("hf", "generate")
    ]
    first, second = (read_metrics(run.folder) for run in runs)
    assert first == second
