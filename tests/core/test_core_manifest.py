"""No damage to a file with a checksum goes unseen."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.core.manifest import DamagedError, require_whole, write_manifest


def make(folder):
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 4)
    (folder / "shards" / "part.txt").write_text("some words\n")
    write_manifest(folder, [folder / "weights.bin", folder / "shards" / "part.txt"])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_flip_cut_and_hole_is_found_and_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    make(folder)
    require_whole(folder)
    name = data.draw(st.sampled_from(["weights.bin", "shards/part.txt"]))
    path = folder / name
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "hole", "longer"]))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    elif kind == "longer":
        content.append(0)
    else:
        end = min(len(content), place + 64)
        content[place:end] = bytes(end - place)
        if bytes(content) == path.read_bytes():
            return  # the hole was there
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedError, match=rf"{name} is damaged"):
        require_whole(folder)


def test_missing_files_and_damaged_manifests(tmp_path):
    require_whole(tmp_path)  # nothing is claimed of a folder without one
    make(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(DamagedError, match=r"weights.bin is missing"):
        require_whole(tmp_path)
    for content in ("", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}', json.dumps({"files": {"a": {}}})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DamagedError, match=r"manifest.json is damaged"):
            require_whole(tmp_path)
