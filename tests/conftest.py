"""What several rooms share: the number of threads, a tiny GPT-2 with the embedded world's tokenizer."""

import hashlib
import os

os.environ.setdefault("TORCHRL_MAXMIN_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

# one is fastest for tiny models; another number is for `make test-portable`
torch.set_num_threads(int(os.environ.get("TORCHRL_MAXMIN_THREADS", "1")))


def pytest_report_header():
    """Say which arithmetic this is: a red float means little without it."""
    wave = torch.linspace(0, 1000, 64 * 500).sin().reshape(64, 500)
    product = hashlib.sha256((wave @ wave.T).numpy().tobytes()).hexdigest()[:6]
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"arithmetic: {capability}, {threads} thread{'s'[: threads > 1]}, product {product}"


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep what ``datasets`` caches of the tests' files out of the user's own cache."""
    try:
        import datasets
    except ImportError:
        return
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets_cache")


@pytest.fixture(scope="session", autouse=True)
def feature_cache(tmp_path_factory):
    """Keep features of the tests' texts out of the user's own cache."""
    os.environ["TORCHRL_MAXMIN_CACHE"] = str(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="session")
def tokenizer():
    from torchrl_maxmin.world import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer, tmp_path_factory):
    """Write a tiny GPT-2 and its tokenizer to a folder; settings override its config."""

    def make(name, **settings):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = {
            "vocab_size": len(tokenizer),
            "n_positions": 64,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.3,  # logits far from uniform
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        folder = tmp_path_factory.mktemp("models") / name
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**(config | settings))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model):
    """Folder of the tiny GPT-2 that most tests use."""
    return make_model("tiny")
