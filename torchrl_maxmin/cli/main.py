"""``torchrl-maxmin``: one verb a stage."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from torchrl_maxmin.errors import UserError

__all__ = ["main"]

#: verb -> (module, config class, function, one line of help)
STAGES = {
    "demo": ("torchrl_maxmin.cli.demo", "DemoConfig", "run_demo", "the whole job on the embedded world"),
    "sft": ("torchrl_maxmin.trainers.sft", "SFTConfig", "run_sft", "fine-tune the reference policy"),
    "reward": ("torchrl_maxmin.trainers.reward", "RewardConfig", "run_reward", "find groups, fit their rewards"),
    "ppo": ("torchrl_maxmin.trainers.ppo", "PPOConfig", "run_ppo", "train the policy for the worst-off group"),
    "evaluate": (
        "torchrl_maxmin.evaluation.measure",
        "EvaluateConfig",
        "run_evaluate",
        "results by group, with intervals",
    ),
}
OTHERS = {
    "data": ("torchrl_maxmin.cli.tools", "data", "data check FILE: what is in a preference data set"),
    "report": ("torchrl_maxmin.cli.tools", "report", "report FOLDER: print and rewrite the report of a run"),
    "env": ("torchrl_maxmin.cli.tools", "env", "versions, for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, or 2 for a mistake of the user's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments else "--help"
    if verb in ("-h", "--help"):
        _say(_usage())
        return 0
    os.environ.setdefault("RL_WARNINGS", "0")
    os.environ.setdefault("RL_LOGGING_LEVEL", "ERROR")
    try:
        if verb in STAGES:
            return _run_stage(verb, arguments)
        if verb in OTHERS:
            module, function, _ = OTHERS[verb]
            return getattr(importlib.import_module(module), function)(arguments)
        raise UserError(f"no verb {verb!r}; choose one of {', '.join([*STAGES, *OTHERS])}")
    except UserError as error:
        _say(f"torchrl-maxmin {verb}: error: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        _say("interrupted", error=True)
        return 130


def _run_stage(verb: str, arguments: list[str]) -> int:
    module_name, config_name, function_name, line = STAGES[verb]
    module = importlib.import_module(module_name)
    config_class = getattr(module, config_name)
    config = _parse(verb, line, config_class, arguments)
    quiet()
    folder = getattr(module, function_name)(config)
    _say(f"{verb} done: {folder}")
    return 0


def _parse(verb: str, line: str, config_class: type, arguments: list[str]) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"torchrl-maxmin {verb}", description=line, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with the same keys as the flags")
    parser.add_class_arguments(config_class)
    parsed = parser.parse_args(_join_lists(config_class, arguments))
    values = parser.instantiate_classes(parsed).as_dict()
    values.pop("config", None)
    return config_class(**values)


def _join_lists(config_class: type, arguments: list[str]) -> list[str]:
    """``--seeds 0 1 2`` as ``--seeds=[0, 1, 2]``, for every field that holds a list."""
    lists = {f"--{f.name}" for f in dataclasses.fields(config_class) if str(f.type).startswith("list")}
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word not in lists:
            joined.append(word)
            continue
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if len(values) == 1 and values[0].startswith("["):
            joined.append(f"{word}={values[0]}")
        else:
            joined.append(f"{word}={json.dumps([int(v) if v.isdigit() else v for v in values])}")
    return joined


def quiet() -> None:
    """Libraries' notices off: what a user should read is what we print."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("torchrl", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _usage() -> str:
    verbs = [*((name, line) for name, (*_, line) in STAGES.items()), *((n, line) for n, (*_, line) in OTHERS.items())]
    return "\n".join(
        [
            "usage: torchrl-maxmin VERB [--flags]     (torchrl-maxmin VERB --help lists them)",
            "",
            *(f"  {name:<10}{line}" for name, line in verbs),
        ]
    )


def _say(text: str, error: bool = False) -> None:
    stream = sys.stderr if error else sys.stdout
    stream.write(text + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
