"""Nothing in a PPO update waits for the device: no value of a tensor there is read, nor gives a shape."""

import traceback

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode

from torchrl_maxmin import masks
from torchrl_maxmin.models import sequences
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.lm_ppo import build_ppo, train_policy
from torchrl_maxmin.trainers.ppo_config import PPOConfig

#: What makes the host wait for a GPU, wherever its tensors lie here.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::_unique2",
}


class Device(TorchDispatchMode):
    """Takes all tensors to be on a device, but those of row lengths and the optimizer's counts of steps."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name in (
            "aten::index",
            "aten::index_put_",
            "aten::index_put",
            "aten::_index_put_impl_",
        ) and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if (name in WAITS or by_mask) and not _on_host():
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def _on_host():
    for frame in traceback.extract_stack():
        if frame.filename == masks.__file__ and frame.name in vars(masks.RowLengths):
            return True
        if frame.filename == sequences.__file__ and "lengths." in (frame.line or ""):
            return True
        if frame.filename.endswith(("torch/optim/optimizer.py", "replay_buffers/storages/base.py")):
            return True
    return False


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    """Train for an iteration; returns what waited in the update, but for its one check."""

    def train(**settings):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(f'{{"prompt": "{"the film was " * (1 + i % 3)}"}}' for i in range(16)))
        config = PPOConfig(
            **{
                "model_name_or_path": tiny_model,
                "dataset_name": str(prompts),
                "output_dir": str(tmp_path / "run"),
                "reward_funcs": [f"{__name__}:short", f"{__name__}:vowels"],
                "rollout_batch_size": 16,
                "mini_batch_size": 8,
                "num_ppo_epochs": 2,
                "response_length": 6,
                "calibration_prompts": 8,
                "num_iterations": 1,
                "device": "cpu",
            }
            | settings
        )
        device, update = Device(), Learner.update

        def watched(*arguments):
            with device:
                return update(*arguments)

        monkeypatch.setattr(Learner, "update", watched)
        train_policy(config, build_ppo(config))
        return device.waits

    return train


def short(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]


def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 3},
        {"entropy_coeff": 0.01, "num_ppo_epochs": 1},
        {"use_peft": True},
        {"use_peft": True, "critic": "heads"},
        {"advantage": "grpo", "num_generations": 4},
    ],
    ids=str,
)
def test_no_optimizer_step_waits_for_the_device(run, settings):
    assert run(**settings) == []


def test_a_wait_would_be_seen(run, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *x: torch.tensor(float(clip(*x))))
    assert run(num_ppo_epochs=1) == ["aten::_local_scalar_dense"] * 4


def test_lengths_that_come_with_the_rows_are_taken():
    mask = torch.tensor([[False, True], [True, True]])
    rows = TensorDict({"prompt_mask": mask, "action_mask": mask.flip(-1)}, [2])
    lengths = masks.row_lengths(rows)
    assert lengths.prompt.tolist() == lengths.response.tolist() == [1, 2]
    assert masks.row_lengths(rows.set_non_tensor("row_lengths", lengths)) is lengths
    assert lengths.take(torch.tensor([1])).response.tolist() == [2]


def test_a_whole_mask_is_what_attention_makes_of_padding(tiny_model, make_model):
    from transformers import AutoModelForCausalLM

    mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    tokens = torch.randint(5, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    trunk = sequences.backbone_of(AutoModelForCausalLM.from_pretrained(tiny_model)).eval()
    assert sequences.takes_whole_mask(trunk)
    expected, found = (sequences.hidden_states(trunk, tokens, mask, whole) for whole in (False, True))
    torch.testing.assert_close(found[mask], expected[mask])
    trunk.config._attn_implementation = "eager"
    assert not sequences.takes_whole_mask(trunk)


class Shapes(TorchDispatchMode):
    """Notes every operation with the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not _on_host():
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            self.seen.append((func._schema.name, shapes))
        return found


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_with_fixed_shapes_every_update_is_the_same_operations(fixed_shapes, learner_and_rows):
    """And gives the same gradients as without, where less is padding."""
    learner, rows = learner_and_rows(fixed_shapes)
    lengths, rows = rows.get_non_tensor("row_lengths"), rows.exclude("row_lengths")
    traces = []
    for index in (torch.arange(4), torch.arange(4, 8)):
        with Shapes() as shapes:
            learner.accumulate(rows[index].set_non_tensor("row_lengths", lengths.take(index)))
        traces.append(shapes.seen)
    assert (traces[0] == traces[1]) == fixed_shapes
    without, _ = learner_and_rows(False)
    without.accumulate(rows[index])
    for actual, expected in zip(gradients(learner), gradients(without), strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def gradients(learner):
    return [p.grad for group in learner.optimizer.groups for p in group if p.grad is not None]


@pytest.fixture
def learner_and_rows(tiny_model, tmp_path):
    """A learner, and eight rows whose lengths differ from the first four to the last."""

    def make(fixed_shapes):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n".join(f'{{"prompt": "{"the film was " * (1 + i // 4)}"}}' for i in range(8)))
        config = PPOConfig(
            model_name_or_path=tiny_model,
            dataset_name=str(prompts),
            output_dir=str(tmp_path / f"run-{fixed_shapes}"),
            reward_funcs=[f"{__name__}:short", f"{__name__}:vowels"],
            rollout_batch_size=8,
            mini_batch_size=4,
            response_length=6,
            calibration_prompts=8,
            fixed_shapes=fixed_shapes,
            device="cpu",
        )
        parts = build_ppo(config)
        torch.manual_seed(0)
        batch = parts.statistics(next(iter(parts.rollouts)))
        rows, _ = parts.advantages(batch)
        order = rows["prompt_mask"].sum(-1).argsort()
        rows = rows.exclude("row_lengths")[order]
        rows["action_mask"][:4, 3:] = False
        lengths = (masks.RowLengths.full if fixed_shapes else masks.RowLengths.of)(rows)
        return parts.learner, rows.set_non_tensor("row_lengths", lengths)

    return make
