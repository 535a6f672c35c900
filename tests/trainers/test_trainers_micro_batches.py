"""Micro-batches add up to the minibatch: gradients, losses and metrics, whatever the masks."""

import json

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from trainers_runs import PPORun
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world.world import sample_reviews

ROWS, RESPONSE, GROUPS = 11, 6, 3
BARS = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(params=BARS, ids=["float32", "float64"])
def dtype(request, monkeypatch):
    if request.param == torch.float64:  # values and the loss of transformers are cast to float32
        monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    return request.param


def language_parts(tiny_model, dtype, tmp_path, micro):
    """A learner of three groups with all terms in its loss, and responses of ragged length."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).eval()
    reference = TokenPolicy(
        model,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=RESPONSE,
    )
    models = FullCopies(reference, tokenizer, GROUPS + 1, entropy=True)
    torch.manual_seed(0)
    nn.init.normal_(models.critic.head.weight, std=0.3)
    models.critic.to(dtype)
    config = PPOConfig(
        "", "", output_dir=str(tmp_path), mini_batch_size=ROWS, per_device_train_batch_size=micro,
        entropy_coeff=0.1, cliprange_value=0.1,
    )  # fmt: skip
    learner = Learner(config, models, 1, ROWS, loss_mask_key="action_mask", kl_to_ref_coeff=0.2)
    lengths = torch.tensor([1, 6, 2, 2, 5, 3, 6, 1, 1, 4, 6])
    batch = TensorDict(
        {
            "prompt_tokens": torch.randint(5, len(tokenizer), (ROWS, 3)),
            "prompt_mask": torch.arange(3) >= torch.randint(0, 3, (ROWS, 1)),
            "action": torch.randint(5, len(tokenizer), (ROWS, RESPONSE)),
            "action_mask": torch.arange(RESPONSE) < lengths[:, None],
            "advantage": torch.randn(ROWS, RESPONSE, 1, dtype=dtype),
            "value_target": torch.randn(ROWS, RESPONSE, GROUPS + 1, dtype=dtype),
            "state_value": torch.randn(ROWS, RESPONSE, GROUPS + 1, dtype=dtype),
        },
        [ROWS],
    )
    noise = torch.randn(2, ROWS, RESPONSE, dtype=dtype) * 0.2
    batch["sample_log_prob"], batch["ref_log_prob"] = models.log_prob(batch) + noise
    return models, learner, batch


def accumulated(models, learner, batch):
    outputs = learner.accumulate(batch)
    parameters = [p for role in models.parameters().values() for p in role]
    return outputs, [p.grad.clone() for p in parameters if p.grad is not None]


def assert_same_gradients(found, expected, bar):
    assert len(found) == len(expected) > 0
    largest = max(gradient.abs().max() for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=bar * max(1.0, float(largest)), rtol=0)
    assert largest > 1e-2


@pytest.mark.parametrize("micro", [1, 3, 7])
def test_a_language_models_gradient_is_that_of_the_minibatch(tiny_model, dtype, tmp_path, micro):
    outputs, expected = accumulated(*language_parts(tiny_model, dtype, tmp_path, 0))
    parts, found = accumulated(*language_parts(tiny_model, dtype, tmp_path, micro))
    assert_same_gradients(found, expected, BARS[dtype])
    assert set(parts.keys()) == set(outputs.keys())
    assert {"loss_entropy", "loss_kl_to_ref", "loss_critic", "loss_objective", "loss"} < set(parts.keys())
    for name, value in outputs.items():
        torch.testing.assert_close(parts[name], value, atol=50 * BARS[dtype], rtol=50 * BARS[dtype], msg=name)
    assert 0 < outputs["clip_fraction"] < 1  # both sides of the clip are in it


def test_a_part_that_counts_itself_alone_would_be_wrong(tiny_model, tmp_path):
    """The masks are ragged enough for the bar to see it."""
    models, learner, batch = language_parts(tiny_model, torch.float64, tmp_path, 0)
    _, expected = accumulated(models, learner, batch)
    learner.optimizer.zero_grad()
    for part in batch.split(3):
        losses = learner.loss(part)
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        (total * len(part) / len(batch)).backward()
    naive = [p.grad for role in models.parameters().values() for p in role if p.grad is not None]
    apart = max((one - other).abs().max() for one, other in zip(naive, expected, strict=True))
    assert apart > 1e-3


def test_statistics_of_the_minibatch_cannot_be_had_from_parts(tiny_model, tmp_path):
    _, learner, batch = language_parts(tiny_model, torch.float32, tmp_path, 3)
    learner.loss.normalize_advantage = True
    with pytest.raises(ValueError, match="whiten the advantage of the whole rollout"):
        learner.accumulate(batch)


def test_memory_is_that_of_forward_passes_in_them_alone(tiny_model, tmp_path, monkeypatch):
    """Actor and critic of each part, one after the other; the last round finds no network."""
    _, learner, batch = language_parts(tiny_model, torch.float32, tmp_path, 7)
    seen = []

    class Memory:
        def __enter__(self):
            seen.append("forward")

        def __exit__(self, *reason):
            seen.append("done")

    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (seen.append("backward"), backward(loss)))
    learner.memory = Memory()
    learner.accumulate(batch)
    assert seen == 2 * [*2 * ["forward", "done", "backward"], "forward", "done"]


def test_a_run_in_micro_batches_is_the_run_in_whole(make_config):
    rows = []
    for name, size in (("whole", 0), ("parts", 3)):
        config = make_config(name, per_device_train_batch_size=size, entropy_coeff=0.01, num_iterations=2)
        PPORun(config).train()
        rows.append(read_metrics(config.output_dir))
    for whole, parts in zip(*rows, strict=True):
        assert parts == pytest.approx(whole, abs=2e-3)
    # before the first update the two are one: the same rollout and the same statistics
    for name, value in rows[0][0].items():
        if name.startswith(("objective/", "rewards/", "maxmin/")):
            assert rows[1][0][name] == value


def with_little_memory(loss, most, error, place=0):
    """Let a loss fail for parts of more rows, from the part of that place on, until rows are fewer."""
    losses, calls = loss.losses_by_network, []

    def fail(part):
        calls.append(len(part))
        if len(part) > most and len(calls) > place:
            raise error
        return losses(part)

    loss.losses_by_network = fail
    return calls


NO_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "system": MemoryError(),
}


@pytest.mark.parametrize(("micro", "place", "rows"), [(0, 0, [11, 6, 5]), (4, 1, [4, 4, 2, 2, 2, 2, 2, 1])])
@pytest.mark.parametrize("kind", NO_MEMORY)
def test_where_memory_does_not_suffice_parts_are_halved(
    tiny_model, dtype, tmp_path, capsys, kind, micro, place, rows
):
    _, expected = accumulated(*language_parts(tiny_model, dtype, tmp_path, micro))
    models, learner, batch = language_parts(tiny_model, dtype, tmp_path, micro)
    calls = with_little_memory(learner.loss, rows[-2], NO_MEMORY[kind], place)
    outputs, found = accumulated(models, learner, batch)
    assert calls == rows
    assert_same_gradients(found, expected, BARS[dtype])
    assert {"loss_critic", "clip_fraction", "loss"} < set(outputs.keys())
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"! memory does not suffice for {rows[0]} rows at once; the update goes on with {rows[-2]}, as by "
        f"--per_device_train_batch_size {rows[-2]}"
    )
    accumulated(models, learner, batch)  # the next one begins with few rows, and says nothing
    assert calls == rows + rows[place + 1 :]
    assert capsys.readouterr().err == ""


def test_parts_stay_halved_where_a_run_goes_on(tiny_model, tmp_path):
    _, learner, batch = language_parts(tiny_model, torch.float32, tmp_path, 0)
    assert "micro_batch_size" not in learner.state_dict()
    with_little_memory(learner.loss, 6, NO_MEMORY["gpu"])
    learner.accumulate(batch)
    state = learner.state_dict()
    assert state["micro_batch_size"] == 6
    for given, kept in ((0, 6), (7, 6), (3, 3)):
        _, again, _ = language_parts(tiny_model, torch.float32, tmp_path, given)
        again.load_state_dict(state)
        assert again.micro_batch.size == kept
        with_little_memory(again.loss, 2, NO_MEMORY["gpu"])
        with pytest.raises(torch.OutOfMemoryError):  # once in a run
            again.accumulate(batch)


@pytest.mark.parametrize(
    ("micro", "change", "error"),
    [
        (1, {}, NO_MEMORY["gpu"]),
        (0, {"sharded": True}, NO_MEMORY["gpu"]),
        (0, {}, RuntimeError("shapes cannot be multiplied")),
    ],
)
def test_what_halves_cannot_mend_is_raised(tiny_model, tmp_path, capsys, micro, change, error):
    _, learner, batch = language_parts(tiny_model, torch.float32, tmp_path, micro)
    vars(learner.micro_batch).update(change)
    with_little_memory(learner.loss, 0, error)
    with pytest.raises(type(error)) as raised:
        learner.accumulate(batch)
    assert raised.value is error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("accepts", [True, False])
def test_an_accumulated_step_of_sft_is_the_step_on_the_whole(
    tiny_model, tmp_path, monkeypatch, dtype, accepts, completion_only
):
    """Every token counts alike, in a model that is told how many there are and in one that is not."""
    rows = [{"prompt": p, "completion": c} for p, c in sample_reviews(12, 0)]
    rows += [{"prompt": row["prompt"], "completion": row["completion"].split()[0]} for row in rows[:9]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = []

    def take(parameters, *_, **__):
        taken.append([p.grad.clone() for p in parameters])
        return torch.zeros(())

    def load(name, **_):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        model.accepts_loss_kwargs = accepts
        return model

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", take)
    monkeypatch.setattr("torchrl_maxmin.trainers.sft.load_causal_lm", load)
    for size, accumulate in ((21, 1), (1, 21), (3, 7), (7, 3)):
        config = SFTConfig(
            tiny_model,
            str(tmp_path / "texts.jsonl"),
            str(tmp_path / f"sft-{size}"),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            completion_only_loss=completion_only,
            device="cpu",
        )
        run_sft(config)
    whole, *others = taken
    for gradients in others:
        assert_same_gradients(gradients, whole, BARS[dtype])
