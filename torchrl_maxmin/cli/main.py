"""``torchrl-maxmin``: one verb a stage. What is imported here is imported by ``--help``: nothing heavy."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence

from torchrl_maxmin import __version__
from torchrl_maxmin.cli.help import asks_for_help, stage_help
from torchrl_maxmin.cli.parsing import closest, mentions, parse_config
from torchrl_maxmin.core.errors import EngineError, Interrupted, LostRankError, SystemFailure, UserError
from torchrl_maxmin.core.system_errors import explained
from torchrl_maxmin.core.text_escape import terminal, terminal_lines

__all__ = ["main"]

#: torchrun ends all when one has failed: a mistake that all of them found is said once
_PATIENCE_S = 2.0

#: verb -> (module, config class, function, one line of help)
STAGES = {
    "demo": ("torchrl_maxmin.cli.demo", "DemoConfig", "run_demo", "the whole job on the embedded world"),
    "sft": ("torchrl_maxmin.trainers.sft", "SFTConfig", "run_sft", "fine-tune the reference policy"),
    "reward": ("torchrl_maxmin.trainers.reward", "RewardConfig", "run_reward", "groups and their rewards"),
    "ppo": (
        "torchrl_maxmin.trainers.lm_ppo",
        "PPOConfig",
        "run_ppo",
        "train for the worst-off group; in an environment with --env_id (ppo --env_id ID --help)",
    ),
    "evaluate": (
        "torchrl_maxmin.evaluation.measure",
        "EvaluateConfig",
        "run_evaluate",
        "results by group, with intervals",
    ),
    "diagnose": (
        "torchrl_maxmin.diagnosis.stage",
        "DiagnoseConfig",
        "run_diagnose",
        "can one reward serve these users?",
    ),
}
#: the policy stage in an environment, which --env_id asks for
ENV_PPO = (
    "torchrl_maxmin.trainers.env_ppo",
    "EnvPPOConfig",
    "run_env_ppo",
    "train for the worst-off group in an environment",
)
#: no stage, but as they are parsed
PLAN = (
    "torchrl_maxmin.trainers.plan",
    "PlanConfig",
    "run_plan",
    "memory and time of a stage, from a model's config alone",
)
OTHERS = {
    "data": ("torchrl_maxmin.cli.tools", "data", "data check FILE: what is in a preference data set"),
    "plan": ("torchrl_maxmin.cli.tools", "plan", PLAN[-1]),
    "report": ("torchrl_maxmin.cli.tools", "report", "report FOLDER: print and rewrite the report of a run"),
    "env": ("torchrl_maxmin.cli.tools", "env", "versions, for a bug report"),
    "recipes": (
        "torchrl_maxmin.cli.recipes",
        "recipes",
        "settings to start from: recipes lists them, recipes cp NAME copies one",
    ),
    "completion": (
        "torchrl_maxmin.cli.completion",
        "completion",
        "completion bash|zsh|fish: a script that completes verbs and flags",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 where a run broke off, 2 for a mistake of the user's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments else "--help"
    if verb in ("-h", "--help"):
        _say(_usage())
        return 0
    if verb == "--version":
        _say(f"torchrl-maxmin {__version__}")
        return 0
    try:
        with explained():
            if (verb in STAGES or verb == "plan") and asks_for_help(arguments):
                _say(_stage_help(verb, arguments))
                raise SystemExit(0)  # as argparse, which the other verbs parse with
            if verb in STAGES:
                return _run_stage(verb, arguments)
            if verb in OTHERS:
                module, function, _ = OTHERS[verb]
                return getattr(importlib.import_module(module), function)(arguments)
        verbs = [*STAGES, *OTHERS]
        near = closest(verb, [*verbs, "--version", "--help"], "")
        raise UserError(f"no verb {verb!r}{near}; choose one of {', '.join(verbs)}")
    except UserError as error:
        if _rank():
            time.sleep(_PATIENCE_S)
        _say(f"torchrl-maxmin {verb}: error: {error}", error=True)
        return 2
    except FloatingPointError as error:  # it names the batch that was saved
        _say(f"torchrl-maxmin {verb}: error: {error}", error=True)
        return 1
    except (LostRankError, EngineError, SystemFailure) as error:
        _say(f"torchrl-maxmin {verb}: error: {error}", error=True)
        return 1
    except Interrupted as error:
        _say(f"torchrl-maxmin {error or f'{verb} ends after {error.name}'}", error=True)
        return 128 + error.signum
    except KeyboardInterrupt:
        _say(f"torchrl-maxmin {verb} ends after Ctrl-C", error=True)
        return 130


def _stage_help(verb: str, arguments: list[str]) -> str:
    in_env = verb == "ppo" and mentions(arguments, "env_id")
    module, config, _, line = ENV_PPO if in_env else (STAGES | {"plan": PLAN})[verb]
    return stage_help("ppo --env_id" if in_env else verb, line, module, config, arguments)


def _run_stage(verb: str, arguments: list[str]) -> int:
    from torchrl_maxmin.core.progress import quiet

    quiet()
    stage = ENV_PPO if verb == "ppo" and mentions(arguments, "env_id") else STAGES[verb]
    module_name, config_name, function_name, line = stage
    module = importlib.import_module(module_name)
    config = parse_config(verb, line, getattr(module, config_name), arguments)
    with explained(config.output_dir):  # before the one around it: this one knows where
        folder = getattr(module, function_name)(config)
    if not _rank():
        _say(f"{verb} done: {folder}")
    return 0


def _rank() -> int:
    """The place of this process among those that torchrun started, from 0."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _usage() -> str:
    usage = "usage: torchrl-maxmin VERB [--flags]     (torchrl-maxmin VERB --help lists them)\n"
    verbs = [f"  {name:<12}{row[-1]}" for name, row in (STAGES | OTHERS).items()]
    return "\n".join([usage, *verbs, "", "  --version   the version of this package"])


def _say(text: str, error: bool = False) -> None:
    stream = sys.stderr if error else sys.stdout
    stream.write((terminal(text, most=2000) if error else terminal_lines(text)) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
