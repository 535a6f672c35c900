"""A run that dies at a write is finished by the one command that the program prints, as if it never died."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.optimizers import MasterWeights

SETTINGS = {
    "sft": {"max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 2},
    "reward": {
        "num_rounds": 2, "steps_per_round": 2, "save_rounds": 1, "identifiability": "false",
        "num_restarts": 2, "calibration_prompts": 1, "response_length": 2, "feature_cache": "false",
        "convergence_tolerance": 0,
    },
    "ppo": {
        "num_iterations": 3, "save_steps": 1, "rollout_batch_size": 4, "mini_batch_size": 4,
        "num_ppo_epochs": 1, "response_length": 4, "calibration_prompts": 2, "calibration": "sft_mean",
    },
    "ppo in an environment": {"save_steps": 1, "total_frames": 288, "eval_episodes": 8},
    "evaluate": {"response_length": 4, "num_samples": 2},
}  # fmt: skip
#: written by the clock
CLOCK = ("wall_seconds", "frames_per_second", "seconds")


class Killed(BaseException):
    """The process is gone."""


def left(folder):
    """What a run leaves, but for the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("run.json", "manifest.json"):
            content = path.read_bytes()
            if path.suffix == ".json":
                content = json.loads(content)
                if isinstance(content, dict):
                    content = {name: value for name, value in content.items() if name not in CLOCK}
            found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture
def dies():
    """Die before the n-th write to the disk (half way in a file of tensors); counts them."""

    patch = pytest.MonkeyPatch()

    def at(moment):
        count = [0]

        def wrapped(function, half=None):
            def call(*arguments, **options):
                count[0] += 1
                if count[0] == moment:
                    if half is not None:
                        half(*arguments)
                    raise Killed
                return function(*arguments, **options)

            return call

        def half_a_file(tensors, path, *_):
            Path(path).write_bytes(b"\x10\x00\x00\x00")

        patch.undo()
        save = wrapped(safetensors.torch.save_file, half_a_file)
        patch.setattr(safetensors.torch, "save_file", save)
        for name in ("replace", "fsync"):
            patch.setattr(os, name, wrapped(getattr(os, name)))
        patch.setattr(Path, "rename", wrapped(Path.rename))
        return count

    yield at
    patch.undo()


def go_on(words, capsys):
    """Start again as before; follow what is printed, if anything is."""
    capsys.readouterr()
    if main(words) == 0:  # it had not begun
        return
    printed = capsys.readouterr().err
    assert "go on with: torchrl-maxmin " in printed, printed
    command = shlex.split(printed.partition("go on with: torchrl-maxmin ")[2])
    assert main(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", SETTINGS)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_run_that_dies_at_a_write_is_finished(stage, here, dies, capsys, verb, every):
    torch.manual_seed(0)
    flags = {"device": "cpu", **SETTINGS[verb]}
    words = [str(word) for word in stage(verb, output_dir="whole", **flags)]
    writes = dies(0)
    assert main(words) == 0
    expected, last = left(here / "whole"), writes[0]
    step = 1 if every == 1 else max(1, last // 4)
    moments = sorted({*range(1, last + 1, step), last})
    deaths = len(moments)
    for moment in moments:
        folder = here / f"dies-{moment}"
        words = [str(word) for word in stage(verb, output_dir=folder.name, **flags)]
        dies(moment)
        try:
            assert main(words) == 0  # later runs may write less, what is cached for one
            deaths -= 1
        except Killed:
            dies(0)
            go_on(words, capsys)
        found = left(folder)
        assert set(found) == set(expected), moment
        for name, content in expected.items():
            if name == "config.yaml":
                continue  # names the folder
            assert found[name] == content, (moment, name)
    assert deaths >= len(moments) - 1


@pytest.fixture
def plain_signals():
    """Handlers as in a program that is started in the foreground, where tests are not."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("verb", ["sft", "reward", "ppo", "ppo in an environment"])
def test_signals_end_a_run_with_a_checkpoint(stage, here, capsys, plain_signals, verb, signum, code):
    """The signal comes when the first checkpoint would be due; the run writes one at the next boundary."""
    flags = {"device": "cpu", **SETTINGS[verb]}
    flags |= {name: 0 for name in ("save_steps", "save_rounds") if name in flags}
    words = [str(word) for word in stage(verb, output_dir="whole", **flags)]
    assert main(words) == 0
    words = [str(word) for word in stage(verb, output_dir="ends", **flags)]
    whole_step, taken = MasterWeights.step, []

    def counted(optimizer):
        whole_step(optimizer)
        taken.append(None)
        if len(taken) == 1:
            os.kill(os.getpid(), signum)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MasterWeights, "step", counted)
        assert main(words) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "all steps until then are in ends/checkpoint-" in lines[0]
    command = shlex.split(lines[0].partition("go on with: torchrl-maxmin ")[2])
    assert main(command) == 0
    whole, ends = left(here / "whole"), left(here / "ends")
    for name in (name for name in whole if name != "config.yaml"):
        assert ends[name] == whole[name], name


@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_an_optimizer_step_keeps_its_rows(stage, here, capsys, verb):
    """Memory may be had otherwise, but not by steps of other rows."""
    flags = {"device": "cpu", **SETTINGS[verb]}
    assert main([str(word) for word in stage(verb, output_dir="out", **flags)]) == 0
    (here / "out" / "summary.json").unlink()  # as if it had died before its end
    words = ["--config", "out/config.yaml", "--resume_from_checkpoint", "last"]
    capsys.readouterr()
    assert main([verb, *words, "--per_device_train_batch_size", "3"]) == 2
    assert "an optimizer step of the checkpoint has" in capsys.readouterr().err
    assert (
        main(
            [verb, *words, "--per_device_train_batch_size", str(flags.get("per_device_train_batch_size", 16))]
        )
        == 0
    )
