"""Numbers that are not finite: found in any dtype, and their batch read back without pickle."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from tensordict import NonTensorData, TensorDict
from torch import nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.finite import NonFiniteError, nonfinite_tensors, require_finite_parameters
from torchrl_maxmin.core.run import require_finite
from torchrl_maxmin.core.run_folder import stage
from torchrl_maxmin.core.settings import CheckedSettings


def test_a_batch_is_read_back_without_pickle(tmp_path):
    batch = TensorDict(
        {
            "action": torch.arange(6).view(2, 3),
            "next": {"reward": torch.tensor([[1.0, float("nan")], [2.0, 3.0]])},
            "mask": torch.tensor([[True], [False]]).expand(2, 3),
            "texts": NonTensorData("a question", batch_size=[2]),
        },
        [2],
    )
    with pytest.raises(
        FloatingPointError, match=r"a reward is nan; the batch that gave it is in (\S+)"
    ) as raised:
        require_finite(float("nan"), batch, tmp_path, "a reward")
    path = tmp_path / "nonfinite_batch.safetensors"
    assert str(path) in str(raised.value)
    found = load_file(path)
    assert found.keys() == {"action", "next.reward", "mask"}
    assert torch.equal(found["action"], batch["action"])
    assert torch.equal(found["mask"], batch["mask"])
    assert torch.equal(found["next.reward"].isnan(), batch["next", "reward"].isnan())
    about = json.loads((tmp_path / "nonfinite_batch.json").read_text())
    assert about["what"] == "a reward is nan"
    assert "a question" in str(about["values"]["texts"])


def test_tensors_that_share_memory_are_kept(tmp_path):
    base = torch.zeros(4, 2)
    with pytest.raises(FloatingPointError):
        require_finite(
            float("inf"), lambda: {"rows": base, "first": base[:1], "turned": base.T}, tmp_path, "x"
        )
    assert load_file(tmp_path / "nonfinite_batch.safetensors")["turned"].shape == (2, 4)


@dataclass
class Config(CheckedSettings):
    output_dir: str
    resume_from_checkpoint: str | None = None

    def check(self):
        """Nothing is wrong with it."""


def test_a_batch_from_where_no_folder_is_known_is_saved_by_the_stage(tmp_path):
    @stage("sft")
    def run(config):
        require_finite(float("nan"), {"rows": torch.ones(2)}, None, "the loss")

    with pytest.raises(FloatingPointError, match="the loss is nan; the batch that gave it is in") as raised:
        run(Config(str(tmp_path)))
    assert isinstance(raised.value.__cause__, NonFiniteError)
    assert not isinstance(raised.value, UserError)
    assert torch.equal(load_file(tmp_path / "nonfinite_batch.safetensors")["rows"], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_every_nonfinite_number_is_found(dtype, bad):
    tensors = {f"t{i}": torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype) for i in range(3)}
    assert nonfinite_tensors(tensors.items()) == []  # the largest numbers are finite, and so would no sum be
    tensors["t1"][2, 4] = bad
    assert nonfinite_tensors(tensors.items()) == ["t1"]


def test_what_holds_no_numbers_is_left_alone():
    packed = torch.zeros(2, dtype=torch.uint8)
    assert (
        nonfinite_tensors([("a", packed), ("b", torch.zeros(0)), ("c", torch.empty(2, device="meta"))]) == []
    )


def test_weights_are_not_saved():
    model = nn.Linear(2, 2)
    require_finite_parameters(model.named_parameters(), "the model")
    with torch.no_grad():
        model.bias[1] = float("inf")
    with pytest.raises(
        FloatingPointError, match=r"1 weights of the model are NaN or infinite \(bias first\)"
    ):
        require_finite_parameters(model.named_parameters(), "the model")
