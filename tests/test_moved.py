"""Import paths of the release before: each leads to where its names are now, and says so."""

import warnings
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import torchrl_maxmin

TABLE = yaml.safe_load((Path(torchrl_maxmin.__file__).parent / "moved.yaml").read_text())
NAMES = {old: new for old, new in TABLE.items() if ":" in old}
MODULES = {old: new for old, new in TABLE.items() if ":" not in old}


@pytest.mark.parametrize(("old", "new"), NAMES.items())
def test_a_name_leads_to_where_it_is_now(old, new):
    module, _, name = old.partition(":")
    place, _, now = new.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = import_module(f"torchrl_maxmin.{module}")
    with pytest.warns(DeprecationWarning, match=f"is now torchrl_maxmin.{place}.{now}; this path goes"):
        found = getattr(before, name)
    assert found is getattr(import_module(f"torchrl_maxmin.{place}"), now)


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_a_module_leads_to_the_one_that_has_its_names(old, new):
    now = import_module(f"torchrl_maxmin.{new}")
    before = import_module(f"torchrl_maxmin.{old}")
    single = {key.partition(":")[2] for key in NAMES if key.partition(":")[0] == old}
    names = set(getattr(now, "__all__", ())) - single
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [name for name in names if getattr(before, name) is not getattr(now, name)] == []
    assert [entry.category for entry in seen] == [DeprecationWarning] * len(names)


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        import_module("torchrl_maxmin.rewards.never")
    with pytest.raises(ImportError, match="never"):
        exec("from torchrl_maxmin.modules.language import never")
