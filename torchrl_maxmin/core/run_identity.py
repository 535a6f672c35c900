"""What a run is: its settings, the content of its inputs, versions; and what may change when it goes on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.manifest import MANIFEST, VIEWS, file_digest
from torchrl_maxmin.core.progress import console

__all__ = ["MAY_CHANGE", "identity_of", "now", "require_same"]

#: of a config, and no part of what a run is
_PLACE = ("output_dir", "resume_from_checkpoint")
#: where and how a stage runs, how it fits into memory, and what it says of itself: no other result but by
#: rounding
MAY_CHANGE = (
    "device",
    "distributed",
    "generation_batch_size",
    "per_device_train_batch_size",
    "report_to",
    "save_rounds",
    "save_steps",
    "save_total_limit",
    "scoring_batch_size",
    "stop_at_iteration",
)
_CODE = "code:"
#: packages whose versions a run notes
_PACKAGES = ("torchrl-maxmin", "torch", "torchrl", "tensordict", "triton", "transformers", "numpy")


def identity_of(verb: str, config: Any, inputs: Sequence[str]) -> dict[str, Any]:
    """What ``run.json`` says of a run that begins.

    Args:
        verb: on the command line.
        config: its settings.
        inputs: fields that name files, folders or functions.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _PLACE}
    return {
        "schema_version": 1,
        "verb": verb,
        "settings": json.loads(json.dumps(settings, default=str)),
        "inputs": {name: _contents(getattr(config, name)) for name in inputs},
        "versions": {package: _version(package) for package in _PACKAGES},
        "started": now(),
        "resumed": [],
        "finished": None,
    }


def require_same(
    folder: Path, before: dict[str, Any], now: dict[str, Any], may_change: Collection[str]
) -> None:
    """Refuse a run of other settings or inputs; say what differs and may."""
    for name, value in now["settings"].items():
        old = before["settings"].get(name)
        if value == old:
            continue
        contents = now["inputs"].get(name, [None])
        # the same files under other paths are the same inputs
        same = None not in contents and contents == before["inputs"].get(name)
        if name in may_change or (same and _names(value) == _names(old)):
            console.print(f"! --{name} is {value!r}, before {old!r}", markup=False, soft_wrap=True)
            continue
        raise UserError(
            f"the run in {folder} has --{name} {old!r}, not {value!r}; resume with its own settings "
            f"(--config {folder / 'config.yaml'}), or choose another --output_dir"
        )
    for name, contents in now["inputs"].items():
        old = before["inputs"].get(name, [])
        if contents == old:
            continue
        if len(contents) == len(old) and all(map(_is_mended, contents, old)):
            line = f"! the code of --{name} {now['settings'][name]} is not what it was when the run began"
            console.print(line, markup=False, soft_wrap=True)
            continue
        raise UserError(
            f"--{name} {now['settings'][name]} has other content than when the run in {folder} began "
            f"(SHA-256 {_short(contents)}, then {_short(old)}); restore it, or choose another --output_dir"
        )
    for package, version in now["versions"].items():
        if version != (old := before["versions"].get(package)):
            console.print(f"! {package} is {version}, before {old}", markup=False, soft_wrap=True)


def _short(contents: list[str | None]) -> str:
    return ", ".join("none" if digest is None else digest[:12] for digest in contents) or "none"


def _is_mended(content: str | None, old: str | None) -> bool:
    """Whether both are of a function's code, which somebody mends so that the run can go on, or the same."""
    return content == old or all(str(digest).startswith(_CODE) for digest in (content, old))


def _texts(value: Any) -> list[str]:
    return [str(text) for text in (value if isinstance(value, list | tuple) else [value]) if text is not None]


def _names(value: Any) -> list[str]:
    """The names before ``=``, of policies."""
    return [text.partition("=")[0] if "=" in text else "" for text in _texts(value)]


def _contents(value: Any) -> list[str | None]:
    """SHA-256 of what a field names: files and folders, alone or after ``name=``, and functions' modules.

    None stands for what is neither, such as a name of the hub.
    """
    return [_content(text.partition("=")[2] or text) for text in _texts(value)]


def _content(text: str) -> str | None:
    path = Path(text)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return file_digest(path / MANIFEST)
        listed = sorted(p for p in path.rglob("*") if p.is_file() and not _is_passing(p.relative_to(path)))
        names = "".join(f"{file_digest(p)} {p.relative_to(path).as_posix()}\n" for p in listed)
        return sha256(names.encode()).hexdigest()
    if path.is_file():
        return file_digest(path)
    module = text.partition(":")[0]
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec(module) if ":" in text else None
        if found is not None and found.origin and Path(found.origin).is_file():
            return _CODE + file_digest(Path(found.origin))
    return None


def _is_passing(path: Path) -> bool:
    """Whether a file in a folder is none of its content: logs, checkpoints, hidden files, views."""
    return path.as_posix() in VIEWS or any(
        part.startswith((".", "checkpoint-")) or part == "logs" for part in path.parts
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def now() -> str:
    """The time, for people."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
