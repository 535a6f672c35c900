"""MaxMin PPO of a model of SmolLM2's shape, 135M parameters, on a GPU: its time and memory, or its profile.

    python benchmarks/contestants/gpu_ppo.py --output FOLDER              # model.json
    python benchmarks/contestants/gpu_ppo.py --profile --output FOLDER    # profile.json

The weights are random (nothing is downloaded) and in bfloat16, with LoRA adapters for policy and critic; two
functions are the groups' rewards. ``model.json`` has the seconds of each iteration after the first by phase,
tokens sampled a second and the peak of memory. ``profile.json`` has one iteration's time on the device and on
the host by phase, the operations that take the most of it, and how often the host waited for the device: in
the optimizer steps as well, a step. ``--small`` is for a rehearsal on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from torchrl_maxmin.core import run
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.lm_ppo import build_ppo, train_policy
from torchrl_maxmin.trainers.ppo_config import PPOConfig

LARGE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL = LARGE | {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
#: What makes the host wait for the device: the driver's calls, and on a CPU the operators that would.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WOULD_WAIT = ("aten::_local_scalar_dense", "aten::nonzero")
PHASES = {"generate": (TokenPolicy, "forward"), "update": (Learner, "update")}


def _word(number: int) -> str:
    """A word of its own for every number, of vowels and other letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[number % 26] + (_word(number // 26 - 1) if number >= 26 else "")


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a random model and a tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words += [_word(i) for i in range(shape["vocab_size"] - len(words))]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=table, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def settings(folder: Path, device: str, small: bool, rows: int, tokens: int) -> PPOConfig:
    """Write model and prompts; returns the settings of ``ppo`` with rollouts of this size."""
    write_model(folder / "model", SMALL if small else LARGE)
    lines = [
        json.dumps({"prompt": " ".join(_word((i + 7 * j) % 500) for j in range(24))}) for i in range(256)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return PPOConfig(
        model_name_or_path=str(folder / "model"),
        dataset_name=str(folder / "prompts.jsonl"),
        output_dir=str(folder / "run"),
        reward_funcs=["race_rewards:short", "race_rewards:vowels"],
        use_peft=True,
        dtype="bfloat16",
        device=device,
        num_iterations=3,
        rollout_batch_size=8 if small else rows,
        mini_batch_size=4 if small else rows // 4,
        num_ppo_epochs=1,
        response_length=8 if small else tokens,
        calibration_prompts=8 if small else 64,
    )


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def watched_phases(spent: Counter[str]) -> Iterator[None]:
    """Name the phases in a profile and add up their seconds, the device's work included."""
    originals = {name: getattr(kind, method) for name, (kind, method) in PHASES.items()}

    def wrapped(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            with record_function(name):
                found = originals[name](*arguments, **options)
                synchronize()
            spent[name] += time.perf_counter() - begin
            return found

        return call

    for name, (kind, method) in PHASES.items():
        setattr(kind, method, wrapped(name))
    try:
        yield
    finally:
        for name, (kind, method) in PHASES.items():
            setattr(kind, method, originals[name])


class Watch:
    """What happens at the end of an iteration: its seconds are noted, and the profiler told."""

    def __init__(self, profiled: int | None):
        self.spent: Counter[str] = Counter()
        self.rows: list[dict[str, float]] = []
        self.begin = time.perf_counter()
        self.profiled = profiled
        self.profiler = profile(activities=list(_activities()))

    def iteration(self) -> None:
        """Note an iteration's seconds by phase."""
        synchronize()
        if len(self.rows) == self.profiled:
            self.profiler.stop()
        now = time.perf_counter()
        whole = now - self.begin
        rest = whole - sum(self.spent.values())
        self.rows.append({"seconds": whole, **self.spent, "rest": rest})
        self.spent.clear()
        if len(self.rows) == self.profiled:
            self.profiler.start()
        self.begin = time.perf_counter()


def _activities() -> Iterable[ProfilerActivity]:
    yield ProfilerActivity.CPU
    if torch.cuda.is_available():
        yield ProfilerActivity.CUDA


def run_watched(config: PPOConfig, watch: Watch) -> None:
    """Train, with the watch told of each iteration's end."""
    write = run.MetricsLog.write

    def written(*arguments: Any) -> None:
        write(*arguments)
        watch.iteration()

    run.MetricsLog.write = written  # type: ignore[method-assign]
    try:
        with watched_phases(watch.spent):
            train_policy(config, build_ppo(config))
    finally:
        run.MetricsLog.write = write  # type: ignore[method-assign]


def measured(config: PPOConfig) -> dict[str, Any]:
    """Train, and return what an iteration takes."""
    watch = Watch(None)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run_watched(config, watch)
    rows = watch.rows[1:]
    tokens = config.rollout_batch_size * config.response_length
    result: dict[str, Any] = {"iterations": rows, "tokens_a_rollout_at_most": tokens}
    result["median"] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    result["tokens_a_second_of_sampling"] = tokens / result["median"]["generate"]
    if torch.cuda.is_available():
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return result


def profiled(config: PPOConfig) -> dict[str, Any]:
    """Train, and return the profile of the last iteration."""
    watch = Watch(config.num_iterations - 1)
    run_watched(config, watch)
    events = list(watch.profiler.events() or [])
    # Each phase ends with a wait for the device, so that its kernels lie within its span.
    spans = {name: [e.time_range for e in events if e.name == name and not _on_device(e)] for name in PHASES}
    on_host = {event.name for event in events if not _on_device(event)}
    device_us: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    waits: dict[str, Counter[str]] = {name: Counter() for name in (*PHASES, "rest")}
    for event in events:
        if _on_device(event):
            if event.name not in on_host:  # else an annotation, as long as all that it is of
                kernels[event.name] += event.time_range.elapsed_us()
                device_us[_phase(event, spans)] += event.time_range.elapsed_us()
            continue
        phase = _phase(event, spans)
        if event.name in (*WAITS, *WOULD_WAIT):
            waits[phase][event.name] += 1
        if event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            launches[phase] += 1
    whole = watch.rows[-1]
    steps = config.rollout_batch_size // config.mini_batch_size * config.num_ppo_epochs
    total = sum(kernels.values()) or 1
    return {
        "seconds_under_the_profiler": whole,
        "seconds_without": watch.rows[-2],
        "device_seconds": sum(kernels.values()) / 1e6,
        "device_seconds_by_phase": {name: us / 1e6 for name, us in device_us.items()},
        "launches": dict(launches),
        "waits": {name: dict(found) for name, found in waits.items()},
        "optimizer_steps": steps,
        "kernels": [{"name": n[:120], "share": us / total} for n, us in kernels.most_common(20)],
    }


def _on_device(event: Any) -> bool:
    return event.device_type != torch.autograd.DeviceType.CPU


def _phase(event: Any, spans: dict[str, list[Any]]) -> str:
    for name, ranges in spans.items():
        if any(r.start <= event.time_range.start <= r.end for r in ranges):
            return name
    return "rest"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="one iteration, operation by operation")
    parser.add_argument("--small", action="store_true", help="a model and a rollout of a few rows")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # A profile has every launch: a tenth as many of them.
        size = (64, 16) if given.profile else (256, 64)
        config = settings(Path(folder), given.device, given.small, *size)
        result = profiled(config) if given.profile else measured(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    stated = {
        "device": device,
        "torch": torch.__version__,
        "settings": "small" if given.small else "135M, bfloat16",
    }
    path = given.output / ("profile.json" if given.profile else "model.json")
    path.write_text(json.dumps(stated | result, indent=2) + "\n")
    print(json.dumps(result, indent=1)[:4000])
    print(f"results: {path}")


if __name__ == "__main__":
    main()
