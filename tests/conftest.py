"""Fixtures every test may use: shared data, and tiny random host models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 97

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported: before any test is
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared models and data: $MAMBACOMPRESS_SHARED, or ../shared beside the repository; skips without.
    """
    path = Path(os.environ.get("MAMBACOMPRESS_SHARED", REPOSITORY.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no shared data at {path}: set MAMBACOMPRESS_SHARED to a folder that holds data/ and models/")
    return path


def _host(kind: str, **overrides: Any) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "state_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    name = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[kind]
    if kind == "mamba2":
        common |= {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 16}
    else:
        common |= {"time_step_rank": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**(common | overrides))
    torch.manual_seed(0)
    host = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in host.named_parameters():
            if "norm" in parameter_name:  # all ones at birth: nothing would notice a fold that forgets them
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            if parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return host


@pytest.fixture
def make_host() -> Any:
    """make_host(kind, **config) -> a random model; kind is mamba, mamba2 or falcon_mamba."""
    return _host


@pytest.fixture
def tiny_mamba() -> Any:
    """A random two-layer MambaForCausalLM, fp32, eval mode."""
    return _host("mamba")


@pytest.fixture
def tiny_mamba2() -> Any:
    """A random two-layer Mamba2ForCausalLM, fp32, eval mode."""
    return _host("mamba2")


@pytest.fixture
def tiny_falcon() -> Any:
    """A random two-layer FalconMambaForCausalLM, fp32, eval mode."""
    return _host("falcon_mamba")


def _tokenizer() -> Any:
    """One token a printable character, 0 the end of text, 1 everything else; 97 in all."""
    import tokenizers
    import transformers

    letters = ["<eos>", "<unk>", *map(chr, range(33, 127)), " "]
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<eos>", bos_token="<eos>", pad_token="<eos>",
        unk_token="<unk>", clean_up_tokenization_spaces=False)


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A character tokenizer that fits the tiny models: 97 tokens, 0 ends a text."""
    return _tokenizer()


@pytest.fixture
def model_directory(tmp_path: Path) -> Any:
    """model_directory(kind, **config) -> the directory of a tiny random model with its tokenizer."""

    def make(kind: str = "mamba", **overrides: Any) -> Path:
        directory = tmp_path / f"tiny-{kind}"
        _host(kind, **overrides).save_pretrained(directory)
        _tokenizer().save_pretrained(directory)
        return directory

    return make
