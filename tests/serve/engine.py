"""vLLM in the test's own process, and what transformers says to the same prompts."""
# pyright: reportMissingImports=false

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tests.families import CONFIGS

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 3, 77, 100, 120], list(range(30, 60))]
NEW = 16
"""Tokens that are generated."""


@dataclass(frozen=True)
class Said:
    """What a model goes on with: tokens, and the logarithm of the probability of each."""

    tokens: list[list[int]]
    logprobs: torch.Tensor


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a family with heads of the smallest width that vLLM's attention on CPUs has: 32."""
    values = CONFIGS[family]().to_dict()
    kind = values.pop("model_type")
    heads = {"head_dim": 32} if "head_dim" in values else {}
    return AutoConfig.for_model(kind, **{**values, "hidden_size": 128, **heads, **changes})


@torch.no_grad()
def expected(folder: Path) -> Said:
    """What the folder's model says in transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        whole = model.generate(torch.tensor([prompt]), **options)
        new = whole[0, len(prompt) :]
        tokens.append(new.tolist())
        likely = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logprobs.append(likely.gather(-1, new[:, None])[:, 0])
    return Said(tokens, torch.stack(logprobs))


def said(llm: Any, **options: Any) -> Said:
    """The same of an engine."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=0)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    answers = [each.outputs[0] for each in llm.generate(prompts, sampling, use_tqdm=False, **options)]
    tokens = [list(each.token_ids) for each in answers]
    chosen = [[step[token].logprob for step, token in zip(each.logprobs, each.token_ids)] for each in answers]  # noqa: B905
    return Said(tokens, torch.tensor(chosen))


def register_here(folder: Path) -> None:
    """Let vLLM ask a model's class what it can do in this process: of its own ones it asks a new one, half a minute."""
    from vllm import ModelRegistry

    for name in (*json.loads((folder / "config.json").read_text())["architectures"], "TransformersForCausalLM"):
        lazy = ModelRegistry.models.get(name)
        if lazy is not None:
            ModelRegistry.register_model(name, lazy.load_model_cls())


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[Any]:
    """An engine for a folder, as short-lived as the block, which says what transformers does."""
    theirs = expected(folder)  # at first: vLLM changes classes of transformers that it runs
    with serving(folder, **options) as llm:
        require_same(said(llm), theirs)
        yield llm


def require_same(ours: Said, theirs: Said) -> None:
    """Fail where an engine says something else."""
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-3, atol=1e-3)


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Any]:
    """An engine for a folder, as short-lived as the block."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    register_here(folder)
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "skip_tokenizer_init": True}
    llm = None
    try:
        llm = LLM(str(folder), **{**settings, **options})
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
