"""One run, one folder, one owner; what was begun goes on, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.interruption import Interrupted, signals_as_interruptions, signals_held
from torchrl_maxmin.core.manifest import DamagedError
from torchrl_maxmin.core.run_folder import own_folder, require_finished, stage


@dataclass
class Settings:
    output_dir: str
    data: str = "data.txt"
    rate: float = 0.1
    steps: int = 3
    save_steps: int = 0
    shares: list[float] = field(default_factory=lambda: [0.5, 0.5])
    resume_from_checkpoint: str | None = None

    def check(self):
        if self.rate < 0:
            raise UserError("--rate is negative")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("some data")
    return tmp_path


def make_stage(body=lambda config: None, **options):
    """A stage that writes its result, if its body lets it."""

    @stage("work", inputs=("data",), length="steps", **options)
    def run(config):
        body(config)
        folder = Path(config.output_dir)
        (folder / "model.txt").write_text(f"{config.rate} {config.steps}")
        (folder / "summary.json").write_text("{}")
        return folder

    return run


def fail(_):
    raise RuntimeError("power cut")


def broken_off(config):
    with pytest.raises(RuntimeError):
        make_stage(fail)(config)


def test_a_run_from_start_to_end(here):
    folder = make_stage()(Settings("out"))
    names = ["config.yaml", "manifest.json", "model.txt", "run.json", "summary.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    facts = json.loads((folder / "run.json").read_text())
    assert facts["verb"] == "work"
    assert facts["settings"]["rate"] == 0.1
    assert len(facts["inputs"]["data"][0]) == 64
    assert facts["versions"]["torch"]
    assert facts["finished"]
    require_finished(folder)


def test_a_second_start_is_told_what_to_do(here):
    broken_off(Settings("out"))
    with pytest.raises(UserError, match=r"--config out/config.yaml --resume_from_checkpoint last") as told:
        make_stage()(Settings("out"))
    assert "broken-off run of work" in str(told.value)
    with pytest.raises(UserError, match=r"out holds a run of work that is not finished; go on with"):
        require_finished("out")
    make_stage()(Settings("out", resume_from_checkpoint="last"))
    with pytest.raises(UserError, match=r"out holds a finished run of work.*choose another --output_dir"):
        make_stage()(Settings("out"))


def test_what_is_finished_is_not_done_again(here):
    make_stage()(Settings("out"))
    assert make_stage(fail)(Settings("out", resume_from_checkpoint="last")) == Path("out")
    # but a longer one goes on
    with pytest.raises(RuntimeError):
        make_stage(fail)(Settings("out", steps=9, resume_from_checkpoint="last"))
    with pytest.raises(UserError, match="not finished"):
        require_finished("out")
    make_stage()(Settings("out", steps=9, resume_from_checkpoint="last"))
    assert (here / "out" / "model.txt").read_text() == "0.1 9"
    require_finished("out")


def test_what_was_damaged_is_made_again(here, capsys):
    folder = make_stage()(Settings("out"))
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("0.2 3")):
        damage(folder / "model.txt")
        make_stage()(Settings("out", resume_from_checkpoint="last"))
        assert "out/model.txt is" in capsys.readouterr().err
        assert (folder / "model.txt").read_text() == "0.1 3"
        require_finished(folder)


def test_damaged_settings_are_written_again(here, capsys):
    path = make_stage()(Settings("out")) / "config.yaml"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    make_stage()(Settings("out", resume_from_checkpoint="last"))
    assert "config.yaml is damaged" in " ".join(capsys.readouterr().err.split())
    assert path.read_bytes() == content
    require_finished("out")


def test_another_verb_is_refused(here):
    make_stage()(Settings("out"))

    @stage("play")
    def play(config):
        raise AssertionError

    for name in (None, "last"):
        with pytest.raises(UserError, match="out holds a run of work; choose another --output_dir for play"):
            play(Settings("out", resume_from_checkpoint=name))


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"rate": 0.2}, "has --rate 0.1, not 0.2"),
        ({"shares": [0.1, 0.9]}, "has --shares"),
        ({"data": "other.txt"}, "has --data 'data.txt', not 'other.txt'"),
        ({"steps": 4}, None),
        ({"save_steps": 2}, None),
        ({"data": "copy.txt"}, None),  # the same content under another name
    ],
)
def test_what_may_change(here, capsys, changes, answer):
    (here / "other.txt").write_text("other data")
    (here / "copy.txt").write_text("some data")
    broken_off(Settings("out"))
    config = Settings("out", **changes, resume_from_checkpoint="last")
    if answer is None:
        make_stage()(config)
        ((name, value),) = changes.items()
        assert f"--{name} is {value!r}, before" in capsys.readouterr().err
        # the config says what was used
        assert f"{name}: {value}" in (here / "out" / "config.yaml").read_text()
        return
    before = (here / "out" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="choose another --output_dir") as told:
        make_stage()(config)
    assert answer in str(told.value)
    assert (here / "out" / "config.yaml").read_bytes() == before


def test_other_content_under_the_same_name(here):
    broken_off(Settings("out"))
    (here / "data.txt").write_text("some data!")
    with pytest.raises(UserError, match=r"--data data.txt has other content than when the run in out began"):
        make_stage()(Settings("out", resume_from_checkpoint="last"))


def test_code_may_be_mended(here, monkeypatch, capsys):
    """A reward function that failed is mended, and the run goes on; that it was is said."""
    monkeypatch.syspath_prepend(str(here))
    (here / "rewards_of_mine.py").write_text("def f(): ...")
    config = Settings("out", data="rewards_of_mine:f")
    broken_off(config)
    (here / "rewards_of_mine.py").write_text("def f(): return 1")
    make_stage()(replace(config, resume_from_checkpoint="last"))
    assert "! the code of --data rewards_of_mine:f is not what it was" in capsys.readouterr().err


def test_other_names_are_another_evaluation(here):
    broken_off(Settings("out", data="sft=data.txt"))
    (here / "copy.txt").write_text("some data")
    with pytest.raises(UserError, match=r"has --data 'sft=data.txt', not 'maxmin=data.txt'"):
        make_stage()(Settings("out", data="maxmin=data.txt", resume_from_checkpoint="last"))
    make_stage()(Settings("out", data="sft=copy.txt", resume_from_checkpoint="last"))


def test_damage_to_what_a_run_left(here):
    folder = make_stage()(Settings("out"))
    (folder / "model.txt").write_text("0.1 4")
    with pytest.raises(DamagedError, match=r"out/model.txt is damaged"):
        require_finished(folder)


@pytest.mark.parametrize("change", [lambda text: text.replace(b"0.1", b"0.3"), lambda text: text[:-9], None])
def test_the_settings_of_a_finished_run_are_its_own(here, change):
    folder = make_stage()(Settings("out"))
    path = folder / "config.yaml"
    content = path.read_bytes()
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(content))
    with pytest.raises(DamagedError, match=r"out/config.yaml is (damaged|missing)"):
        require_finished(folder)
    path.write_bytes(content)
    require_finished(folder)


def test_equal_results_in_two_folders_are_one_model(here):
    first, second = (make_stage()(Settings(name)) for name in ("out", "other"))
    assert (first / "config.yaml").read_bytes() != (second / "config.yaml").read_bytes()
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


@pytest.mark.parametrize("path", ["out", "new/and/deep"])
def test_a_refusal_leaves_nothing(here, path):
    def refuse(config):
        raise UserError("no")

    for config in (Settings(path), Settings(path, rate=-1.0)):
        with pytest.raises(UserError):
            make_stage(refuse)(config)
    assert [p.name for p in here.iterdir()] == ["data.txt"]
    with pytest.raises(UserError, match="there is no run in"):
        make_stage()(Settings(path, resume_from_checkpoint="last"))
    assert [p.name for p in here.iterdir()] == ["data.txt"]


HOLD = """
import sys, time
from pathlib import Path
from torchrl_maxmin.core.run_folder import own_folder
with own_folder(Path("out"), "work"):
    print("mine", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def owner(here):
    """A process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_has_one_owner(owner):
    with pytest.raises(
        UserError, match=rf"out is in use: process {owner.pid} on .* runs work in it since 20"
    ):
        make_stage()(Settings("out"))
    owner.kill()
    owner.wait()
    make_stage()(Settings("out"))  # what a dead one held is free


def test_a_child_of_a_dead_owner_holds_nothing(here):
    lock = here / "out" / ".lock"
    lock.parent.mkdir()
    with own_folder(Path("out"), "work"):
        content = json.loads(lock.read_text())
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        lock.write_text(json.dumps(content | {"pid": dead.pid}))
        with own_folder(Path("out"), "work"):
            assert json.loads(lock.read_text())["pid"] == os.getpid()


def send(signum):
    os.kill(os.getpid(), signum)
    time.sleep(0)  # where Python hands it over


def ask(*signums, at_the_end=False):
    """Get signals in a block that holds the first; says what waits, if it is asked."""
    with signals_held() as waiting:
        assert not waiting()
        for signum in signums:
            send(signum)
        if at_the_end:
            return
        assert waiting() == signums[0]
        raise Interrupted(waiting(), "at the boundary")


@pytest.fixture
def plain_signals():
    """Handlers as in a program that is started in the foreground, where tests are not."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_wait_for_a_boundary(plain_signals):
    with signals_as_interruptions():
        with pytest.raises(Interrupted) as plain:
            send(signal.SIGTERM)
        assert (plain.value.signum, plain.value.name, str(plain.value)) == (signal.SIGTERM, "SIGTERM", "")
        with pytest.raises(Interrupted, match="at the boundary"):
            ask(signal.SIGINT)
        with pytest.raises(Interrupted) as twice:
            ask(signal.SIGINT, signal.SIGINT)
        assert not str(twice.value)
        with pytest.raises(Interrupted):
            ask(signal.SIGTERM, at_the_end=True)
        ask(at_the_end=True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interrupted_run_says_how_to_go_on(here):
    def body(config):
        raise Interrupted(signal.SIGTERM, "all steps until then are in out/checkpoint-3")

    with pytest.raises(Interrupted) as told:
        make_stage(body)(Settings("out"))
    assert str(told.value) == (
        "work ends after SIGTERM: all steps until then are in out/checkpoint-3; go on with: "
        "torchrl-maxmin work --config out/config.yaml --resume_from_checkpoint last"
    )
