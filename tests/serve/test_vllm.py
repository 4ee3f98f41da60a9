"""Folders of ours, served by vLLM as they are."""
# pyright: reportMissingImports=false

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layershare.errors import LayershareError
from layershare.model.composition import Composition, Member, Term, deltas, shared
from layershare.model.hub import LayershareConfig, save
from layershare.model.swap import Dropped, member_of
from tests.families import tiny_model
from tests.model.small import adopt, compressed, filled
from tests.serve.engine import check, config_of, serving

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")

FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "starcoder2"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_what_it_says_in_transformers(family, tmp_path):
    save(compressed(family, config=config_of(family)), tmp_path / "small")
    with serving(tmp_path / "small") as llm:
        check(llm, tmp_path / "small")
