"""What every phase of a stage holds and how long it takes, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.models.loading import load_config
from torchrl_maxmin.models.lora import AdapterSwitch, LoraSettings
from torchrl_maxmin.models.memory import log_probs_of, states_of, values_of
from torchrl_maxmin.models.sequences import backbone_of, hidden_states, text_config, without_cache
from torchrl_maxmin.rewards.adapters import adapter_names
from torchrl_maxmin.trainers.plan_messages import gradient_messages, ppo_messages, reward_messages
from torchrl_maxmin.trainers.plan_networks import Network, Reader, Size, reward_reader
from torchrl_maxmin.trainers.plan_traces import FLOAT, Phase, Planner

__all__ = ["stage_phases"]

#: held whole by every process, also where it has a part of all else
_NEVER_DEALT = ("adapters", "value heads", "reward adapters and heads")
_CHECKED = 64  # rows of the first rollout that are scored once more, at once


def stage_phases(settings: Any, planner: Planner) -> list[Phase]:
    """The phases of a stage.

    Args:
        settings: a :class:`~torchrl_maxmin.trainers.plan.PlanConfig`, checked, with no flag left open.
        planner: makes the traces.
    """
    return {"ppo": _ppo, "sft": _sft, "reward": _reward}[settings.stage](settings, planner)


def _lora(settings: Any) -> LoraSettings:
    targets = settings.lora_target_modules
    return LoraSettings(
        settings.lora_r, 2 * settings.lora_r, settings.lora_dropout, tuple(targets or ("all-linear",))
    )


def _share(rows: int, settings: Any) -> int:
    """Rows of a process, of those of them all."""
    return -(-rows // settings.gpus)


def _held(
    settings: Any, planner: Planner, weights: dict[str, float], sizes: Sequence[Size], stepped: bool = True
) -> dict[str, float]:
    """Parts that stay from phase to phase, of one of the processes.

    Args:
        settings: of the stage.
        planner: knows what a process holds before.
        weights: bytes by part.
        sizes: of what is trained.
        stepped: whether there was a step of the optimizer.
    """
    shards = settings.gpus if settings.distributed == "fsdp2" else 1

    def dealt(whole: float, part: float) -> float:
        return whole + part / shards

    parts = {
        name: dealt(size, 0) if name in _NEVER_DEALT else dealt(0, size)
        for name, size in weights.items()
        if size
    }
    if settings.stage == "ppo" and settings.use_peft:  # log-probabilities read the output embeddings
        whole_embeddings = float(sizes[0].embeddings)
        parts["trunk weights"] = dealt(whole_embeddings, weights["trunk weights"] - whole_embeddings)
    # adapters and heads are trained whole in every process
    whole = [size for size in sizes if size.adapters or not size.layers]
    part = [size for size in sizes if size.layers and not size.adapters]
    if stepped:
        parts["gradients"] = dealt(sum(s.gradients for s in whole), sum(s.gradients for s in part))
        parts["Adam states"] = 2 * FLOAT * dealt(sum(s.trained for s in whole), sum(s.trained for s in part))
        half = dealt(sum(s.half for s in whole), sum(s.half for s in part))
        parts |= {"float32 copies": FLOAT * half} if half else {}
    if shards > 1:
        depth = text_config(load_config(settings.model_name_or_path)).num_hidden_layers
        parts["gathered layers"] = 2 * max(weights.values()) / depth
    return planner.overhead | parts


def _written(planner: Planner, size: Size) -> dict[str, float]:
    """What a model takes while it is written: weights with their adapter, and on a CPU the file's bytes."""
    merged = {"merged weights": float(size.adapted)} if size.adapted else {}
    return merged | ({"file's bytes": float(size.weights)} if planner.device == "cpu" else {})


# -- ppo -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Roles:
    """Who is who in a run of PPO, and what all of them weigh."""

    policy: Network
    reference: Network
    critic: Network | None
    shares_states: bool
    weights: dict[str, float]
    trained: list[Size]


def _roles(settings: Any, planner: Planner) -> _Roles:
    """The networks of ``--use_peft`` and ``--critic``."""
    name, dtype = settings.model_name_or_path, settings.torch_dtype()
    common: dict[str, Any] = {"dtype": dtype, "checkpointing": settings.gradient_checkpointing}
    reference = Network(name, dtype=dtype)
    columns = settings.num_groups + 1
    kind = settings.critic if settings.advantage == "gae" else None
    width = text_config(load_config(name)).hidden_size
    heads = Size.of_heads(columns * (width + 1)) if kind else None
    whole = Network(name, "trunk", trained=True, **common)
    if not settings.use_peft:
        policy = Network(name, trained=True, **common)
        weights: dict[str, float] = {
            "policy weights": planner.size(policy).weights,
            "reference weights": planner.size(reference).weights,
        }
        trained = [planner.size(policy)]
        critic = None if kind is None else policy if kind == "heads" else whole
    else:
        names = ("policy", "critic") if kind == "adapter" else ("policy",)
        policy = Network(name, trained=True, adapters=names, active="policy", lora=_lora(settings), **common)
        size = planner.size(policy)
        weights = {"trunk weights": size.weights, "adapters": len(names) * size.adapters}
        trained = [size]
        critic = {"adapter": policy.through("critic"), "heads": policy, "full": whole}.get(kind or "")
    if kind == "full" or (kind and not settings.use_peft and kind != "heads"):
        weights["critic weights"] = planner.size(whole).weights
        trained.append(planner.size(whole))
    if heads is not None:
        weights["value heads"] = heads.weights
        trained.append(heads)
    return _Roles(policy, reference, critic, kind == "heads", weights, trained)


def _ppo(settings: Any, planner: Planner) -> list[Phase]:
    roles = _roles(settings, planner)
    prompt, response = settings.max_prompt_length, settings.response_length
    rollout = _share(settings.rollout_batch_size, settings)
    mini = _share(min(settings.mini_batch_size, settings.rollout_batch_size), settings)
    micro = min(settings.per_device_train_batch_size or mini, mini)
    reader = None
    if not settings.reward_funcs:
        lora = _lora(settings) if settings.use_peft and settings.share_reward_trunk else None
        reader = reward_reader(settings.reward_model_path, roles.reference, lora, settings.num_groups)
    weights = dict(roles.weights)
    if reader is not None and reader.shared:
        weights["reward adapters and heads"] = reader.added
    elif reader is not None:
        weights["reward model"] = planner.size(reader.network).weights + reader.added
    if planner.device == "cpu":
        weights["file of resized embeddings"] = planner.size(roles.reference).embeddings
    before = _held(settings, planner, weights, roles.trained, stepped=False)
    held = _held(settings, planner, weights, roles.trained)

    samples = _share(settings.calibration_prompts * settings.calibration_samples, settings)
    at_once = min(settings.generation_batch_size, samples)
    dealt = {"given": settings.distributed != "none"}
    parts, seconds = planner.sampling(
        roles.reference, at_once, prompt, response, settings.temperature, **dealt
    )
    calibrate = Phase("calibrate", before | parts, seconds * samples / at_once, ("generation_batch_size",))

    at_once = min(settings.generation_batch_size, rollout)
    parts, seconds = planner.sampling(roles.policy, at_once, prompt, response, settings.temperature, **dealt)
    generate = Phase("generate", held | parts, seconds * rollout / at_once, ("generation_batch_size",))

    score = _score(settings, planner, roles, reader, rollout)
    score.parts = held | score.parts

    parts, seconds = _update(settings, planner, roles, micro, accumulate=micro < mini)
    steps = settings.num_ppo_epochs * -(-rollout // mini)
    workspaces = [planner.optimizer(size) for size in roles.trained]
    workspace = max(held for held, _ in workspaces)
    if workspace > sum(parts.values()):
        parts = {"optimizer step": workspace}
    seconds = seconds * settings.num_ppo_epochs * rollout / micro + steps * sum(s for _, s in workspaces)
    flags = ("per_device_train_batch_size", "gradient_checkpointing")
    update = Phase("update", held | parts | planner.pieces(parts, roles.policy), seconds, flags)
    save = Phase("save", held | _written(planner, planner.size(roles.policy)))
    phases = [calibrate, generate, score, update, save]
    critics = [] if roles.critic is None or roles.shares_states else [roles.critic]
    passing = [planner.size(network) for network in (roles.policy, *critics)]
    columns = settings.num_groups + 1 if roles.critic is not None else 0
    sent = ppo_messages(settings, passing, roles.trained, columns=columns, micro=micro)
    return [phase.sending(sent.get(phase.name, ()), settings) for phase in phases]


def _score(settings: Any, planner: Planner, roles: _Roles, reader: Reader | None, rollout: int) -> Phase:
    """Log-probabilities of the reference, values and rewards of a rollout, one after the other."""
    prompt, response = settings.max_prompt_length, settings.response_length
    rows = min(settings.scoring_batch_size, rollout)
    batches = rollout / rows
    traces = [(planner.scoring(roles.reference, rows, prompt, response, log_probs=True), batches)]
    if roles.critic is not None:
        columns = settings.num_groups + 1
        values = planner.scoring(roles.critic, rows, prompt, response, log_probs=False, columns=columns)
        traces.append((values, batches))
    if reader is not None:
        rewards = planner.scoring(reader.network, rows, 1, prompt + response, log_probs=False)
        traces.append((rewards, reader.passes * batches))
    check = planner.scoring(roles.policy, min(_CHECKED, rollout), prompt, response, log_probs=True)
    worst = max([*(trace for trace, _ in traces), check], key=lambda trace: trace.peak)
    seconds = sum(trace.seconds * times for trace, times in traces)
    parts = {"activations": worst.peak - worst.logits, "log-prob chunks": worst.logits}
    return Phase("score", parts, seconds, ("scoring_batch_size",))


def _update(
    settings: Any, planner: Planner, roles: _Roles, micro: int, *, accumulate: bool
) -> tuple[dict[str, float], float]:
    """Parts and seconds of a micro-batch's passes."""
    shape = (micro, settings.max_prompt_length, settings.response_length)
    columns, entropy = settings.num_groups + 1, settings.entropy_coeff > 0

    def of_policy(model: nn.Module) -> Tensor:
        states = states_of(model, *shape)
        loss = log_probs_of(model, states, entropy).sum()
        # heads learn what can be read off the policy's states, and do not move them
        return loss + values_of(states.detach(), columns).sum() if roles.shares_states else loss

    def of_critic(model: nn.Module) -> Tensor:
        return values_of(states_of(model, *shape), columns).sum()

    key = (*shape, columns, entropy, roles.shares_states)
    train = partial(planner.training, accumulate=accumulate, mapped=planner.mapped(*roles.trained))
    if roles.critic is None or roles.shares_states:
        traces = [train([roles.policy], [of_policy], "policy", *key, reuse=True)]
    else:  # the critic's pass begins when the actor's is done
        traces = [
            train([roles.policy], [of_policy], "policy", *key, reuse=True),
            train([roles.critic], [of_critic], "critic", *key, reuse=accumulate),
        ]
    worst = max(traces, key=lambda trace: trace.peak)
    parts = {"activations": worst.peak - worst.logits, "log-prob chunks": worst.logits}
    return parts, sum(trace.seconds for trace in traces)


# -- sft and reward --------------------------------------------------------------------------------------


def _sft(settings: Any, planner: Planner) -> list[Phase]:
    names = ("policy",) if settings.use_peft else ()
    network = Network(
        settings.model_name_or_path,
        dtype=settings.torch_dtype(),
        trained=True,
        adapters=names,
        active=names[0] if names else None,
        lora=_lora(settings),
        checkpointing=settings.gradient_checkpointing,
    )
    size = planner.size(network)
    weights: dict[str, float] = {"policy weights": size.weights, "adapters": size.adapters * len(names)}
    held = _held(settings, planner, weights, [size])
    rows, tokens = settings.per_device_train_batch_size, settings.max_length

    def loss(model: Any) -> Tensor:
        model.train()  # the Trainer of transformers keeps dropout
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        return model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **without_cache(model)
        ).loss

    accumulate = settings.gradient_accumulation_steps > 1
    how = {"accumulate": accumulate, "reuse": accumulate, "mapped": planner.mapped(size)}
    trace = planner.training([network], [loss], rows, tokens, **how)
    _, step = planner.optimizer(size, foreach=False)
    seconds = settings.gradient_accumulation_steps * trace.seconds + step
    update = Phase(
        "update",
        held | {"activations": trace.peak} | planner.pieces({"activations": trace.peak}, network),
        seconds,
        ("per_device_train_batch_size", "gradient_checkpointing"),
    )
    sent = gradient_messages(settings, [size], [size], steps=1, passes=settings.gradient_accumulation_steps)
    return [update.sending(sent, settings), Phase("save", held | _written(planner, size))]


def _reward(settings: Any, planner: Planner) -> list[Phase]:
    groups = settings.num_groups
    names: tuple[str, ...] = ()
    if settings.use_peft:
        names = tuple(adapter_names(settings.adapters, groups))
    base = Network(settings.model_name_or_path)
    network = Network(
        settings.model_name_or_path,
        "trunk",
        settings.torch_dtype(),
        trained=True,
        adapters=names,
        lora=_lora(settings),
        checkpointing=settings.gradient_checkpointing,
    )
    size = planner.size(network)
    weights: dict[str, float] = {"trunk weights": size.weights, "adapters": size.adapters * len(names)}
    before = _held(settings, planner, weights, [size], stepped=False)
    held = _held(settings, planner, weights, [size])
    pairs, tokens = settings.per_device_train_batch_size, settings.max_length
    passes = groups if len(names) > 1 else 1

    def loss(model: Any) -> Tensor:
        ids = torch.zeros(2 * pairs, tokens, dtype=torch.int64)

        def read() -> Tensor:
            return hidden_states(backbone_of(model), ids, torch.ones_like(ids, dtype=torch.bool))[:, -1]

        if not names:
            return read().float().sum()
        switch, total = AdapterSwitch(model, names[0]), torch.zeros(())
        for name in names[:passes]:
            with switch.using(name):
                total = total + read().float().sum()
        return total

    accumulate = settings.gradient_accumulation_steps > 1
    how = {"accumulate": accumulate, "reuse": accumulate, "mapped": planner.mapped(size)}
    trace = planner.training([network], [loss], pairs, tokens, passes, **how)
    workspace, step = planner.optimizer(size)
    parts = {"activations": trace.peak} if trace.peak > workspace else {"optimizer step": workspace}
    update = Phase(
        "update",
        held | parts | planner.pieces(parts, network),
        settings.gradient_accumulation_steps * trace.seconds + step,
        ("per_device_train_batch_size", "gradient_checkpointing"),
    )
    rows = settings.scoring_batch_size
    read = planner.scoring(base, rows, 1, tokens, log_probs=False)
    features = planner.overhead | {"frozen trunk": planner.size(base).weights, "activations": read.peak}
    read = planner.scoring(network, rows, 1, tokens, log_probs=False)
    score = Phase("score", held | {"activations": read.peak}, passes * read.seconds, ("scoring_batch_size",))
    samples = settings.calibration_prompts * settings.calibration_samples
    at_once = min(settings.generation_batch_size, samples)
    drawn, seconds = planner.sampling(base, at_once, settings.max_prompt_length, settings.response_length)
    gradients = {"reference weights": planner.size(base).weights, "gradients": size.gradients}
    parts, flags = before | gradients | drawn, ("generation_batch_size",)
    calibrate = Phase("calibrate", parts, seconds * samples / at_once, flags)
    width = text_config(load_config(settings.model_name_or_path)).hidden_size
    sent = reward_messages(settings, size, Size.of_heads(groups * width, tensors=1), passes=passes)
    return [
        Phase("features", features, None, ("scoring_batch_size",)),
        update.sending(sent.get("update", ()), settings),
        score.sending(sent.get("score", ()), settings),
        calibrate,
        Phase("save", before | {"gradients": size.gradients} | ({} if names else _written(planner, size))),
    ]
