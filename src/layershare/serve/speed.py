"""How long vLLM takes to read and to write: each engine in a process of its own, so that two can take turns."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import packages_distributions
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from layershare.errors import LayershareError
from layershare.foreign import reading

BLOCK = 128
"""Tokens of a block of the cache, at most."""
PATIENCE = 10
"""Seconds that an engine may take to end."""
MEMORY = "memory"
"""The question for that."""


def vllm_package() -> str:
    """The installed package that has vLLM; its build for CPUs is another one. Raises `LayershareError` without one."""
    found = packages_distributions().get("vllm")
    if not found:
        raise LayershareError("The engine vllm is not installed: `pip install vllm`, or take --engine transformers.")
    return found[0]


class Engine:
    """A model in vLLM, in another process; `dtype` and `device` are those that it runs in."""

    def __init__(self, model: str, answers: Connection) -> None:
        self._model = model
        self._answers = answers
        self.dtype, self.device = self._answer()

    def seconds(self, prompts: Tensor, new: int) -> dict[str, float]:
        """How long it takes, by phase, to read prompts `[rows, tokens]` and to add `new` tokens to each, greedily.

        By the clock of vLLM's scheduler: from when it takes up the prompts until the first token of all is there, and
        from then to the last one. Raises `LayershareError` if vLLM fails, or cannot take up all prompts at once.
        """
        with suppress(OSError):  # it has ended, which the answer tells
            self._answers.send((prompts.tolist(), new))
        return self._answer()

    def memory(self) -> int:
        """The most bytes that the engine has held so far: of an accelerator's memory, or of its process's on a CPU."""
        with suppress(OSError):
            self._answers.send(MEMORY)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._answers.recv()
        except (EOFError, OSError) as error:
            raise LayershareError(
                f"vLLM ended while it ran '{self._model}', as it does where memory is short: take smaller batches."
            ) from error
        if isinstance(answer, LayershareError):
            raise answer
        return answer


@contextmanager
def engine(model: str, *, rows: int, length: int, **options: Any) -> Iterator[Engine]:
    """The engine for the model in a folder or on the hub, with room for `rows` texts of `length` tokens at once.

    `options` are vLLM's. Raises `LayershareError` if vLLM does not start with the model.
    """
    settings = {
        "max_model_len": length,
        "max_num_seqs": rows,
        "max_num_batched_tokens": rows * length,  # so that all prompts are read in one step
        "gpu_memory_utilization": 0.01,  # what must be free, since the cache's size is given
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **options,
    }
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, model, settings))
    process.start()
    theirs.close()
    try:
        yield Engine(model, ours)
    finally:
        with suppress(OSError):  # it has ended
            ours.send(None)
        process.join(PATIENCE)
        process.terminate()


def _work(questions: Connection, model: str, settings: dict[str, Any]) -> None:
    """Be the process of an engine: answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks is stopped, too
    for stream in (1, 2):  # vLLM logs a lot, and what fails is answered
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this is the process
    try:
        with reading(f"'{model}'", f"see what `vllm serve {model}` says"):
            from vllm import LLM

            llm = LLM(model, kv_cache_memory_bytes=_cache_bytes(model, settings), **settings)
            config = llm.llm_engine.vllm_config
            questions.send((str(config.model_config.dtype).removeprefix("torch."), config.device_config.device_type))
            for asked in iter(questions.recv, None):
                questions.send(_most_memory() if asked == MEMORY else _seconds(llm, *asked))
    except LayershareError as error:
        questions.send(error)


def _most_memory() -> int:
    """Of this process."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_reserved()
    import resource  # not on Windows, where vLLM does not run

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cache_bytes(model: str, settings: dict[str, Any]) -> int:
    """What keys and values need if each text has a partly filled block, and one more block is vLLM's own."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model, **settings).create_engine_config()
    ours, ways = config.model_config, config.parallel_config
    width = 2 * ours.get_num_layers(ways) * ours.get_num_kv_heads(ways) * ours.get_head_size()
    tokens = settings["max_num_seqs"] * (settings["max_model_len"] + 2 * BLOCK)
    return tokens * width * ours.dtype.itemsize


def _seconds(llm: Any, prompts: list[list[int]], new: int) -> dict[str, float]:
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
    times = [answer.metrics for answer in answers]
    first, last = times[0].first_token_ts, max(each.last_token_ts for each in times)
    if any(each.first_token_ts != first for each in times):
        raise LayershareError(f"vLLM has no room for {len(prompts)} prompts at once: take smaller batches.")
    return {"prefill": first - min(each.scheduled_ts for each in times), "decode": last - first}
