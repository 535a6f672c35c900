"""Load the reproductions' scripts, which are no package: several folders hold a run.py."""

import importlib.util
import sys
from pathlib import Path

REPRODUCTIONS = Path(__file__).parents[1] / "reproductions"


def on_path(name):
    """Make what a reproduction's folder holds importable by name; returns the folder."""
    for folder in (REPRODUCTIONS / name, REPRODUCTIONS):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return REPRODUCTIONS / name


def load_script(path):
    """Import ``reproductions/<path>``, whatever other folders call theirs."""
    folder, _, file = path.partition("/")
    spec = importlib.util.spec_from_file_location(f"{folder}_{Path(file).stem}", on_path(folder) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
