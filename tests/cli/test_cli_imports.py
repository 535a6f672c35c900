"""What an import costs: no room loads a library that it does not need."""

import subprocess
import sys

import pytest

from torchrl_maxmin.cli.main import main

HEAVY = ["transformers", "datasets", "matplotlib", "gymnasium"]
ROOMS = ["preferences", "rewards", "welfare", "envs", "objectives", "collectors", "evaluation"]

SCRIPT = f"""
import importlib, sys
import torchrl_maxmin
assert "torch" not in sys.modules
for name in ["torchrl_maxmin.cli.main", *("torchrl_maxmin." + room for room in {ROOMS})]:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY} if heavy in sys.modules]
    assert not loaded, f"{{name}} imports {{loaded}}"
print("clean")
"""


def test_rooms_import_lightly():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "clean", run.stderr


@pytest.mark.parametrize(("package", "told"), [("transformers", "models"), ("datasets", "data")])
def test_a_missing_package_is_named_with_its_extra(package, told, monkeypatch, capsys, tiny_model, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "texts.jsonl").write_text('{"text": "the film"}\n')
    flags = ["--dataset_name", str(tmp_path / "texts.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert main(["sft", "--model_name_or_path", tiny_model, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert line.endswith(f"{package}: pip install 'torchrl-maxmin[llm]'")
    assert not (tmp_path / "out").exists()


def test_a_look_at_data_needs_none_of_the_heavy_libraries(tmp_path):
    """Nor datasets: their imports took four of five seconds."""
    row = '{"prompt": "p", "chosen": "a", "rejected": "b", "user_id": "u"}\n'
    (tmp_path / "pairs.jsonl").write_text(row)
    script = (
        "import sys\nfrom torchrl_maxmin.cli.main import main\n"
        f"assert main(['data', 'check', {str(tmp_path / 'pairs.jsonl')!r}]) == 0\n"
        "assert 'pyarrow' in sys.modules\n"
        "heavy = ('torch', 'tensordict', 'transformers', 'scipy.sparse', 'datasets')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
