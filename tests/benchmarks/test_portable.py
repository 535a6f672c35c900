"""The matrix of instruction sets and threads: which cells there are, and what makes one red."""

import pytest
import torch

SUITE = """
def test_green():
    pass


def test_red():
    assert 0.1 + 0.2 == 0.3
"""


def test_cells_go_up_to_what_the_processor_has(portable):
    cells = list(portable.cells())
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.threads for cell in cells} == {1, 2}
    native = torch.backends.cpu.get_cpu_capability()
    assert [cell.capability for cell in cells].count(native) == 2
    assert cells[-1].capability == native


@pytest.mark.slow  # minutes: the rooms with arithmetic, under another instruction set
def test_a_cell_computes_with_what_it_names(portable, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    first = next(portable.cells())
    arguments = ["--rooms", "models/test_models_mlp.py", "--cells", first.name, "--logs", str(tmp_path)]
    assert portable.main([*arguments, "-k", "for_every_group"]) == 0
    title, row, last = capsys.readouterr().out.splitlines()
    assert title.split() == ["cell", "passed", "failed", "seconds", "product"]
    assert row.split()[:3] == [first.name, "1", "0"]
    assert last == f"logs: {tmp_path}"
    log = (tmp_path / f"{first.name}.txt").read_text()
    assert f"arithmetic: {first.capability}, 1 thread, product {row.split()[-1]}" in log
    assert portable.main([*arguments, "-k", "no_such_test"]) == 1
    assert f"{first.name}: pytest ended with status 5" in capsys.readouterr().out


def test_a_red_test_and_a_setting_that_did_not_take_are_complaints(portable, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    cell = portable.Cell("none-1", 1, "NONE", {})
    found = portable.run(cell, [str(tmp_path)], tmp_path / "log.txt", [])
    assert (found.passed, found.failed) == (1, 1)
    red, setting = found.complaints
    assert "test_suite.py::test_red" in red
    assert setting.startswith("asked for NONE and 1 threads, found ")
