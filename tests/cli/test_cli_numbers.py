"""Every flag that is a number: NaN, infinity and what is below its range are refused by name."""

import dataclasses
import math
import re

import pytest
from cli_forms import IN_ENV, config_class

from torchrl_maxmin.core.errors import UserError

COMMON = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
#: what each stage needs besides, for its other settings to be looked at
STAGE_FLAGS = {
    "demo": {},
    "sft": COMMON,
    "reward": COMMON,
    "ppo": COMMON | {"reward_funcs": ["a:f"]},
    IN_ENV: {"output_dir": "o", "env_id": "gridworld"},
    "evaluate": {"policies": ["sft=a", "maxmin=b"], "dataset_name": "d", "output_dir": "o", "judge": "j"},
    "diagnose": COMMON,
}
#: numbers that have a documented meaning
ALLOWED = {("sft", "max_steps", -1), ("*", "max_grad_norm", math.inf)}


def cases():
    found = []
    for stage in STAGE_FLAGS:
        for field in dataclasses.fields(config_class(stage)):
            if (stage, field.name) == ("demo", "num_groups"):
                continue  # the reward stage of a demo looks at it
            numbers = set(re.findall(r"\b(int|float)\b", str(field.type)))
            odd = [-1] if numbers == {"int"} else [-1.0, math.nan, math.inf] if numbers else []
            for value in odd:
                if not ALLOWED & {(stage, field.name, value), ("*", field.name, value)}:
                    given = [value] if str(field.type).startswith("list") else value
                    found.append(pytest.param(stage, field.name, given, id=f"{stage}-{field.name}-{value}"))
    return found


@pytest.mark.parametrize(("stage", "name", "value"), cases())
def test_no_number_means_nothing(stage, name, value):
    config_class(stage)(**STAGE_FLAGS[stage]).check()
    with pytest.raises(UserError, match=f"--{name}\\b"):
        config_class(stage)(**STAGE_FLAGS[stage] | {name: value}).check()


@pytest.mark.parametrize(("stage", "name", "value"), sorted(ALLOWED, key=str))
def test_what_documented_numbers_mean_is_not_refused(stage, name, value):
    for each in ["ppo", IN_ENV] if stage == "*" else [stage]:
        config_class(each)(**STAGE_FLAGS[each] | {name: value}).check()
