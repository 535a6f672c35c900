"""One run, one folder, one owner: its lock, what it was started with, and how it goes on."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shlex
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from torchrl_maxmin.core.distributed import of_main_process, restarted
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.finite import NonFiniteError, nonfinite_batch
from torchrl_maxmin.core.interruption import Interrupted, signals_as_interruptions
from torchrl_maxmin.core.manifest import (
    MANIFEST,
    DamagedError,
    file_digest,
    require_digest,
    require_whole,
    write_manifest,
)
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import config_text, write_config, write_json
from torchrl_maxmin.core.run_identity import MAY_CHANGE, identity_of, now, require_same

Stage = TypeVar("Stage", bound=Callable[[Any], Any])

__all__ = [
    "continued",
    "how_to_go_on",
    "is_unfinished",
    "no_run",
    "own_folder",
    "require_finished",
    "stage",
]

RUN, LOCK = "run.json", ".lock"
_NEW, _BEGUN, _FINISHED = "new", "begun", "finished"
_CONFIG_DIGEST = "config_sha256"  # of a finished run
_FIELDS = ("schema_version", "verb", "settings", "inputs", "versions", "started", "resumed", "finished")


def stage(
    verb: str,
    *,
    inputs: Sequence[str] = (),
    may_change: Collection[str] = (),
    length: str = "",
    result: str = "summary.json",
) -> Callable[[Stage], Stage]:
    """Wrap the function of a verb: it owns its output folder, and what was broken off goes on.

    The folder is locked before any work and until the end. ``run.json`` there says what the run was started
    with: its settings, the content of its inputs, versions. A second start without ``resume_from_checkpoint``
    is told how to go on; one with it is compared to the first, and does nothing where the run is finished.
    Where a new run ends in :class:`UserError` before it wrote anything, no folder stays behind.

    Args:
        verb: on the command line.
        inputs: fields that name files, folders or functions, whose content must stay.
        may_change: further fields that may change from one part of a run to the next.
        length: the field that says how long the run is; with another value a finished run goes on.
        result: the file that the function writes last of all.
    """

    def wrap(function: Stage) -> Stage:
        @functools.wraps(function)
        def run(config: Any) -> Any:
            config.check()
            folder = Path(config.output_dir)
            with own_folder(folder, verb), signals_as_interruptions():
                may = {*may_change, length, *MAY_CHANGE}
                begun = of_main_process(lambda: _open(folder, verb, config, inputs, may, length, result))
                if begun == _FINISHED:
                    return folder
                try:
                    outcome = function(config)
                except NonFiniteError as error:  # from where no folder is known
                    raise nonfinite_batch(error.batch, folder, str(error)) from error
                except UserError:
                    if begun == _NEW:
                        of_main_process(lambda: _remove_if_empty(folder))
                    raise
                except Interrupted as error:
                    kept = f": {error}" if str(error) else ""
                    text = f"{verb} ends after {error.name}{kept}; {how_to_go_on(folder, verb)}"
                    raise Interrupted(error.signum, text) from None
                of_main_process(lambda: _close(folder, result))
                return outcome

        return run  # type: ignore[return-value]

    return wrap


def how_to_go_on(folder: Path, verb: str) -> str:
    """The command that finishes a run, ready to paste."""
    path = shlex.quote(str(folder / "config.yaml"))
    return f"go on with: torchrl-maxmin {verb} --config {path} --resume_from_checkpoint last"


def continued(folder: Path) -> bool:
    """Whether a folder holds a run that was begun."""
    return (folder / RUN).is_file()


def no_run(folder: Path) -> UserError:
    """What to raise where a folder holds no run that could go on."""
    return UserError(f"there is no run in {folder} to go on with; start one without --resume_from_checkpoint")


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that has not come to its end."""
    return continued(folder) and not _read(folder)["finished"]


def require_finished(folder: str | Path) -> None:
    """Refuse what a run left that has not come to its end, and what is not as it was written.

    Raises:
        UserError: with the command that finishes the run.
        DamagedError: naming the file.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        require_whole(folder)
        _require_own_config(folder)
    elif continued(folder):
        verb = _read(folder)["verb"]
        raise UserError(f"{folder} holds a run of {verb} that is not finished; {how_to_go_on(folder, verb)}")


# -- one owner -------------------------------------------------------------------------------------


@contextmanager
def own_folder(folder: Path, verb: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made; of processes that work as one, the main one holds it.

    What was made is removed again if the block leaves nothing there.

    Raises:
        UserError: where another process holds it, or the path is a file.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    held: list[int] = []
    of_main_process(lambda: held.append(_lock(folder, verb)))
    try:
        yield
    finally:
        for handle in held:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)
            with suppress(OSError):  # the first that holds something ends it
                for path in new:
                    path.rmdir()


def _lock(folder: Path, verb: str) -> int:
    """Lock a folder; returns the open file that holds it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output folder {folder} is a file; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            if _is_dead(owner):  # a child of it holds the file open
                path.unlink(missing_ok=True)
                continue
            who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
            raise UserError(
                f"{folder} is in use: {who} runs {owner.get('verb', 'something')} in it since "
                f"{owner.get('since', '?')}; wait for it, or choose another --output_dir"
            ) from None
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        os.close(handle)  # its owner removed it in between
    content = {"pid": os.getpid(), "host": socket.gethostname(), "verb": verb, "since": now()}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(content).encode(), 0)
    return handle


def _owner(handle: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(handle, 4096, 0))
    except ValueError:  # it is about to write its name
        return {}
    return content if isinstance(content, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        pass
    return False


def _remove_if_empty(folder: Path) -> None:
    """Remove what only says that a run began, where there is nothing else."""
    own = {RUN, LOCK, "config.yaml"}
    if {path.name for path in folder.iterdir()} <= own:
        for name in (RUN, "config.yaml"):
            (folder / name).unlink(missing_ok=True)


# -- one identity ----------------------------------------------------------------------------------


def _open(
    folder: Path,
    verb: str,
    config: Any,
    inputs: Sequence[str],
    may_change: Collection[str],
    length: str,
    result: str,
) -> str:
    """Begin a run, or compare it to the one that is there; returns which of the two it is."""
    resumes = bool(getattr(config, "resume_from_checkpoint", None)) or restarted()
    used = not _only_begun(folder, config)
    if not continued(folder):
        if resumes and not restarted():
            raise no_run(folder)
        if used and not restarted():
            raise UserError(f"output folder {folder} is not empty; choose another --output_dir or remove it")
        before = None
    else:
        before = _read(folder)
        if before["verb"] != verb:
            raise UserError(
                f"{folder} holds a run of {before['verb']}; choose another --output_dir for {verb}"
            )
        if not resumes:
            state = "finished" if before["finished"] else "broken-off"
            remedy = "choose another --output_dir" if before["finished"] else how_to_go_on(folder, verb)
            raise UserError(f"{folder} holds a {state} run of {verb}, begun {before['started']}; {remedy}")
    identity = identity_of(verb, config, inputs)
    if before is not None:
        require_same(folder, before, identity, may_change)
        longer = bool(length) and identity["settings"][length] != before["settings"].get(length)
        if before["finished"] and not longer and _is_whole(folder):
            console.print(
                f"{folder} is finished already, since {before['finished']}", markup=False, soft_wrap=True
            )
            return _FINISHED
        identity |= {"started": before["started"], "resumed": [*before["resumed"], now()]}
    for name in (MANIFEST, result):  # of a shorter run
        (folder / name).unlink(missing_ok=True)
    write_config(folder, config)
    write_json(folder / RUN, identity)
    return _NEW if before is None else _BEGUN


def _is_whole(folder: Path) -> bool:
    """Whether all that a finished run wrote is still as it was; what is not is said, and made again."""
    try:
        require_whole(folder)
        _require_own_config(folder)
    except DamagedError as error:
        console.print(f"! {error}; the run goes on", markup=False, soft_wrap=True)
        return False
    return True


def _require_own_config(folder: Path) -> None:
    """Refuse settings that are not those of the run.

    The manifest lists all but them: it is what a model is known by, wherever its folder was.
    """
    if continued(folder) and (digest := _read(folder).get(_CONFIG_DIGEST)) is not None:
        require_digest(folder / "config.yaml", digest)


def _only_begun(folder: Path, config: Any) -> bool:
    """Whether a folder without a run holds nothing, or what one that died as it began had written."""
    own = {LOCK, ".config.yaml.partial", "run.partial"}
    others = [path for path in folder.iterdir() if path.name not in own]
    return all(path.name == "config.yaml" and path.read_text() == config_text(config) for path in others)


def _close(folder: Path, result: str) -> None:
    """Note that a run is at its end, with checksums of what it wrote; nothing where it stopped before."""
    if not (folder / result).is_file():
        return
    own = (RUN, MANIFEST, "config.yaml")
    write_manifest(
        folder,
        (p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name not in own),
    )
    digest = file_digest(folder / "config.yaml")
    write_json(folder / RUN, _read(folder) | {"finished": now(), _CONFIG_DIGEST: digest})


def _read(folder: Path) -> dict[str, Any]:
    """What a folder says of its run.

    Raises:
        UserError: where it cannot be read.
    """
    try:
        content = json.loads((folder / RUN).read_text())
        return {name: content[name] for name in _FIELDS} | {_CONFIG_DIGEST: content.get(_CONFIG_DIGEST)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RUN} is damaged; choose another --output_dir") from error
