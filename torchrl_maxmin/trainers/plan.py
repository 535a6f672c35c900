"""Memory and time of a stage from the model's config alone, and which flags would make it fit."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchrl_maxmin.core.run import prepare_output_dir, write_config, write_json
from torchrl_maxmin.models.loading import import_transformers, load_config, require_causal_lm, require_trunk
from torchrl_maxmin.models.rates import Rates, measure_rates
from torchrl_maxmin.models.sequences import require_positions
from torchrl_maxmin.trainers.plan_config import GB, PlanConfig
from torchrl_maxmin.trainers.plan_networks import Network
from torchrl_maxmin.trainers.plan_phases import stage_phases
from torchrl_maxmin.trainers.plan_ranks import measure_ranks
from torchrl_maxmin.trainers.plan_traces import Phase, Planner

__all__ = ["GB", "Plan", "PlanConfig", "make_plan", "run_plan", "verdict"]

#: a CUDA context and the libraries' kernels, which this package cannot measure without a GPU
CONTEXT = 1.0 * GB
_BATCHES = ("generation_batch_size", "scoring_batch_size", "per_device_train_batch_size")


# -- the plan ----------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What a stage needs.

    Attributes:
        phases: bytes and seconds by phase, of one process.
        budget: bytes that there are.
        parameters: of the model.
        rates: what the seconds rest on; names the machine, and says whether the network was measured.
        settings: with no flag left open.
        advice: flags that would make it fit, and the peak that each leaves; empty where it fits.
    """

    phases: list[Phase]
    budget: float
    parameters: int
    rates: dict[str, Any]
    settings: PlanConfig
    advice: list[tuple[dict[str, Any], float]] = dataclasses.field(default_factory=list)

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.worst.total <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """What ``summary.json`` holds; all sizes in bytes."""
        return {
            "parameters": self.parameters,
            "phases": {
                phase.name: {
                    "bytes": phase.total,
                    "seconds": phase.seconds,
                    "parts": phase.parts,
                    "messages": [asdict(message) for message in phase.messages],
                }
                for phase in self.phases
            },
            "peak": {"phase": self.worst.name, "bytes": self.worst.total},
            "budget_bytes": self.budget,
            "fits": self.fits,
            "advice": [{"flags": flags, "peak_bytes": peak} for flags, peak in self.advice],
            "rates": self.rates,
        }


def make_plan(config: PlanConfig) -> Plan:
    """Plan a stage.

    Raises:
        UserError: for settings that cannot be, and models that cannot be had.
    """
    config.check()
    if config.stage == "reward":
        require_trunk(config.model_name_or_path)
    else:
        require_causal_lm(config.model_name_or_path)
    settings = config.resolved()
    if settings.stage == "ppo":
        require_positions(
            load_config(settings.model_name_or_path),
            settings.max_prompt_length or 0,
            settings.response_length or 0,
        )
    overhead = {"libraries": _libraries(settings)} if settings.device == "cpu" else {"CUDA context": CONTEXT}
    rates, settings, figures = _measure(config, settings)
    planner = Planner(settings.device, rates, overhead)
    budget = (settings.memory_gb or 0.0) * GB
    plan = Plan(
        stage_phases(settings, planner),
        budget,
        planner.size(Network(settings.model_name_or_path)).parameters,
        figures,
        settings,
    )
    if not plan.fits:
        plan.advice = list(find_fitting(settings, planner, budget))
    return plan


def _measure(config: PlanConfig, settings: PlanConfig) -> tuple[Rates, PlanConfig, dict[str, Any]]:
    """Rates of this machine, settings with the network's figures, and all of these as json has them."""
    dtypes = tuple(dict.fromkeys((torch.float32, settings.torch_dtype())))
    if settings.gpus == 1 or settings.device == "cuda":
        rates = measure_rates(torch.device(settings.device if torch.cuda.is_available() else "cpu"), dtypes)
        network = {} if settings.gpus == 1 else {"network": asdict(settings.link()) | {"measured": False}}
        return rates, settings, rates.to_dict() | network
    rates, link = measure_ranks(settings.gpus, dtypes)
    measured = config.network_gb_per_s is None and config.network_latency_us is None
    if config.network_gb_per_s is None:
        settings = replace(settings, network_gb_per_s=link.bandwidth / GB)
    if config.network_latency_us is None:
        settings = replace(settings, network_latency_us=1e6 * link.latency)
    return rates, settings, rates.to_dict() | {"network": asdict(settings.link()) | {"measured": measured}}


def run_plan(config: PlanConfig) -> Plan:
    """Plan a stage, and write ``summary.json`` where there is an ``output_dir``."""
    folder = None if config.output_dir is None else prepare_output_dir(config.output_dir)
    plan = make_plan(config)
    if folder is not None:
        write_config(folder, config)
        write_json(folder / "summary.json", {"settings": asdict(plan.settings)} | plan.to_dict())
    return plan


def _libraries(settings: PlanConfig) -> float:
    """Bytes of this process once it has imported what the stage imports."""
    modules = {"ppo": "lm_ppo", "sft": "sft", "reward": "reward"}
    importlib.import_module(f"torchrl_maxmin.trainers.{modules[settings.stage]}")
    for name in ("datasets", "transformers.generation.utils", *(["peft"] if settings.use_peft else [])):
        importlib.import_module(name)
    transformers = import_transformers()
    config = load_config(settings.model_name_or_path)
    _ = transformers.MODEL_MAPPING[type(config)]  # imports the architecture
    if (Path(settings.model_name_or_path) / "tokenizer.json").is_file():
        _ = transformers.AutoTokenizer.from_pretrained(settings.model_name_or_path)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024.0 for line in status if line.startswith("VmRSS"))


# -- what would fit ------------------------------------------------------------------------------------------


def find_fitting(
    settings: PlanConfig, planner: Planner, budget: float
) -> Iterator[tuple[dict[str, Any], float]]:
    """Flags that make a plan fit, each found by planning again, and the peak that they leave.

    First smaller batches alone, then each switch alone or with smaller batches. Where none of these does, the
    switches together, as many as it takes.

    Args:
        settings: that do not fit, with no flag left open.
        planner: made their plan.
        budget: bytes that there are.
    """
    found = [
        found
        for change in ({}, *_switches(settings))
        if (found := _shrunk(settings, change, planner, budget))
    ]
    alone = [(flags, peak) for flags, peak in found if len(flags) == 1]
    yield from alone or found
    together: dict[str, Any] = {}
    for switch in () if found else _switches(settings):
        together |= switch
        if fitting := _shrunk(settings, together, planner, budget):
            yield fitting
            return


def _switches(settings: PlanConfig) -> Iterator[dict[str, Any]]:
    """Changes of a flag that save memory, those that change least of what is learned first."""
    if not settings.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if settings.gpus > 1 and settings.distributed != "fsdp2":
        yield {"distributed": "fsdp2"}
    if settings.torch_dtype() != torch.bfloat16:
        yield {"dtype": "bfloat16"}
    if not settings.use_peft:
        yield {"use_peft": True} | ({"critic": "adapter"} if settings.stage == "ppo" else {})
    elif settings.adapters == "per_group" and settings.stage == "reward":
        yield {"adapters": "shared"}
    if settings.stage == "ppo" and settings.advantage == "gae":
        if settings.critic != "heads":
            yield {"critic": "heads"}
        yield {"advantage": "rloo"}


def _shrunk(
    settings: PlanConfig, change: Mapping[str, Any], planner: Planner, budget: float
) -> tuple[dict[str, Any], float] | None:
    """A change, and the largest batches by halves that fit with it; None where those of one row do not."""
    flags = dict(change)
    while True:
        phases = stage_phases(replace(settings, **flags), planner)
        over = [phase for phase in phases if phase.total > budget]
        if not over:
            return flags, max(phase.total for phase in phases)
        name = next((flag for flag in over[0].flags if flag in _BATCHES), None)
        size = _batch(settings, name) if name and name not in flags else None
        if name is None or size is None or size == 1:
            return None
        while size > 1:
            size //= 2
            phases = stage_phases(replace(settings, **{**flags, name: size}), planner)
            affected = [phase for phase in phases if name in phase.flags]
            if all(phase.total <= budget for phase in affected):
                break
        flags[name] = size


def _batch(settings: PlanConfig, name: str) -> int:
    """Rows that a batch flag lets be at once, as things are."""
    given = getattr(settings, name)
    most = {
        "generation_batch_size": max(
            settings.rollout_batch_size or 1,
            (settings.calibration_prompts or 1) * (settings.calibration_samples or 1),
        ),
        "scoring_batch_size": settings.rollout_batch_size or given,
        "per_device_train_batch_size": min(
            settings.mini_batch_size or given, settings.rollout_batch_size or given
        ),
    }[name]
    if settings.stage != "ppo":
        return given
    return min(given or most, most)


# -- words ---------------------------------------------------------------------------------------------------


def flag_text(flags: Mapping[str, Any]) -> str:
    """Flags as they are typed."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in flags.items())


def verdict(plan: Plan, settings: PlanConfig) -> Sequence[str]:
    """Say in a few lines whether a plan fits, and what would."""
    worst, budget = plan.worst, plan.budget / GB
    where = f"--gpus {settings.gpus} of {budget:.0f} GB" if settings.device == "cuda" else f"{budget:.1f} GB"
    peak = f"peak {worst.total / GB:.2f} GB, in {worst.name}"
    if plan.fits:
        return [f"{peak}: fits {where}, {(plan.budget - worst.total) / GB:.1f} GB to spare"]
    over = ", ".join(phase.name for phase in plan.phases if phase.total > plan.budget)
    lines = [f"{peak}: does not fit {where} ({over})"]
    for flags, peak_bytes in plan.advice:
        bring = "brings" if len(flags) == 1 else "bring"
        lines.append(f"  {flag_text(flags)} {bring} it to {peak_bytes / GB:.1f} GB")
    if not plan.advice:
        lines.append("  no flag of this plan makes it fit: a smaller model, or more or larger GPUs")
    return lines
