"""Tasks that are done once: a run that was cut off goes on, and one with other settings starts anew."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.run_folder import continued
from torchrl_maxmin.core.tasks import Task


@dataclass(frozen=True)
class Step:
    """A task that writes one folder, and the mark that it leaves there.

    Attributes:
        function: called with ``config``; may find ``folder`` absent or empty, or its own run in it.
        config: a dataclass.
        folder: what it writes; removed before it runs, but for a run of the same step that can go on.
        digest: of the function, its config and everything before it.
    """

    function: Callable[[Any], Any]
    config: Any
    folder: Path
    digest: str

    @property
    def mark(self) -> Path:
        """Where a finished step leaves its digest and how long it took."""
        return self.folder / "done.json"

    @property
    def beginning(self) -> Path:
        """Where a step that has begun leaves its digest."""
        return self.folder.with_name(f".{self.folder.name}.begun")

    @property
    def goes_on(self) -> bool:
        """Whether the same step was broken off, and can go on."""
        begun = self.beginning.is_file() and self.beginning.read_text() == self.digest
        return begun and hasattr(self.config, "resume_from_checkpoint") and continued(self.folder)

    @property
    def done(self) -> bool:
        """Whether it was finished before with the same settings and the same steps before it."""
        return self.mark.is_file() and json.loads(self.mark.read_text())["digest"] == self.digest


def run_step(step: Step) -> None:
    """Run a step, unless it is done."""
    if step.done:
        return
    config = step.config
    if step.goes_on:
        config = replace(config, resume_from_checkpoint="last")
    else:
        shutil.rmtree(step.folder, ignore_errors=True)
        step.folder.parent.mkdir(parents=True, exist_ok=True)
        step.beginning.write_text(step.digest)
    start = time.perf_counter()
    step.function(config)
    done = {"digest": step.digest, "seconds": time.perf_counter() - start}
    step.mark.write_text(json.dumps(done) + "\n")
    step.beginning.unlink(missing_ok=True)


@dataclass
class Plan:
    """Steps by name, each after those that it needs."""

    tasks: dict[str, Task] = field(default_factory=dict)

    def add(
        self,
        name: str,
        function: Callable[[Any], Any],
        config: Any,
        folder: Path,
        after: tuple[str, ...] = (),
    ) -> str:
        """Add a step; returns its name, for ``after`` of others."""
        before = [self.tasks[other].config.digest for other in after]
        told = [f"{function.__module__}.{function.__name__}", asdict(config), before]
        digest = hashlib.sha256(json.dumps(told, default=str, sort_keys=True).encode()).hexdigest()
        self.tasks[name] = Task(run_step, Step(function, config, folder, digest), after)
        return name

    def seconds(self) -> dict[str, float]:
        """How long each finished step took when it ran."""
        marks = {name: task.config.mark for name, task in self.tasks.items()}
        return {name: json.loads(m.read_text())["seconds"] for name, m in marks.items() if m.is_file()}

    def needed(self, names: Iterable[str]) -> dict[str, Task]:
        """Return these tasks and all that they wait for, in the order of the plan."""
        found, left = set(), list(names)
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self.tasks[name].after
        return {name: task for name, task in self.tasks.items() if name in found}

    def done(self, name: str) -> bool:
        """Whether a step is done."""
        return self.tasks[name].config.done
