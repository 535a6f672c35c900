"""Peak memory of one PPO update at the width of a 7B model, beside its plan and beside plain ``log_softmax``.

    python benchmarks/wide.py                    # Llama of 4096 wide, 2 layers, 512 + 512 tokens; minutes
    python benchmarks/wide.py --quick            # seconds; a small model, not judged

LoRA in bfloat16 on random weights, four groups, a micro-batch of 4 responses, layers computed again at
backward: the update of a minibatch (policy and critic, forward and backward, AdamW) in a process of its own.
Bars, or the exit status is 1: the peak of the process is at most 1.10 times what ``plan`` says of the update;
what the update takes beyond the weights is at most .5 of what it takes with the model's own logits and
``log_softmax``; the plan of all 32 layers is at most 40 GB.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from facts import CONTESTANTS, facts, peak_of, results_file, words, write

OVER_PLAN, OVER_PLAIN, WHOLE_GB = 1.10, 0.5, 40.0
ROWS = 4


def write_model(folder: Path, given: argparse.Namespace, layers: int) -> Path:
    """Write the config of a Llama; returns its folder."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": given.hidden,
        "intermediate_size": given.intermediate,
        "num_attention_heads": given.heads,
        "num_key_value_heads": given.heads,
        "num_hidden_layers": layers,
        "vocab_size": given.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    write(folder / "config.json", config)
    return folder


def plan(model: Path, given: argparse.Namespace, output: Path) -> dict[str, Any]:
    """What ``plan`` says of the same settings on this processor."""
    flags = {
        "model_name_or_path": model,
        "num_groups": given.groups,
        "reward_funcs": ["a:b"],  # plans count them, and call none
        "device": "cpu",
        "dtype": "bfloat16",
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "gradient_checkpointing": given.gradient_checkpointing,
        "rollout_batch_size": ROWS,
        "mini_batch_size": ROWS,
        "per_device_train_batch_size": given.micro,
        "generation_batch_size": ROWS,
        "scoring_batch_size": given.micro,
        "max_prompt_length": given.prompt,
        "response_length": given.response,
        "num_ppo_epochs": 1,
        "output_dir": output,
    }
    peak_of(["-m", "torchrl_maxmin", "plan", *words(flags)], threads=given.threads)
    return json.loads((output / "summary.json").read_text())


def measure(model: Path, given: argparse.Namespace, *, plain: bool) -> dict[str, float]:
    """The update in a process of its own: bytes at its peak, and those held before."""
    names = ("groups", "prompt", "response", "micro", "gradient_checkpointing")
    settings = {name: getattr(given, name) for name in names} | {"rows": ROWS, "plain": plain}
    command = [str(CONTESTANTS / "wide_update.py"), str(model), json.dumps(settings)]
    _, output = peak_of(command, threads=given.threads)
    return json.loads(output.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=512, help="tokens of a response")
    parser.add_argument("--micro", type=int, default=4, help="responses in memory at once, of 4")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small model, measured and not judged")
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/wide.json")
    given = parser.parse_args()
    if given.quick:
        given.hidden, given.heads, given.intermediate, given.vocabulary = 64, 2, 128, 2048
        given.prompt = given.response = 32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", given, given.layers)
        planned = plan(model, given, folder / "plan")
        whole = plan(write_model(folder / "whole", given, 32), given, folder / "whole_plan")
        ours, plain = (measure(model, given, plain=kind) for kind in (False, True))
    update = planned["phases"]["update"]["bytes"]
    taken, plain_taken = (figures["peak"] - figures["held"] for figures in (ours, plain))
    bars = {
        "peak over the plan of the update": (ours["peak"] / update, OVER_PLAN),
        "update beyond the weights, over plain log_softmax": (taken / plain_taken, OVER_PLAIN),
        "plan of 32 layers, GB": (whole["peak"]["bytes"] / 1e9, WHOLE_GB),
    }
    print(
        f"planned {update / 1e9:.2f} GB; ours {ours['peak'] / 1e9:.2f} GB, {taken / 1e9:.2f} of it the update"
    )
    print(f"plain log_softmax: {plain['peak'] / 1e9:.2f} GB, {plain_taken / 1e9:.2f} of it the update")
    for text, (value, bar) in bars.items():
        print(f"{text}: {value:.3f}, at most {bar}{'' if value <= bar else ': missed'}")
    if given.quick and given.output is None:
        return 0
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "quick")}
    result = {
        "environment": facts(threads=given.threads),
        "settings": settings,
        "planned": {name: phase["bytes"] for name, phase in planned["phases"].items()},
        "parts": planned["phases"]["update"]["parts"],
        "ours": ours,
        "plain": plain,
        "bars": {
            text: {"value": value, "bar": bar, "holds": value <= bar} for text, (value, bar) in bars.items()
        },
    }
    write(given.output or results_file("wide.json"), result)
    return 0 if given.quick else int(any(value > bar for value, bar in bars.values()))


if __name__ == "__main__":
    sys.exit(main())
