"""Files that commands are given, and what a folder holds."""

import json

PAIR = {"prompt": "the film", "chosen": "was great .", "rejected": "was dull .", "user_id": "ann"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
