"""Peak memory of calibrating and compressing a model from disk. Writes results.json beside this file.

A random Llama in bfloat16 is compressed in a fresh process, whose anonymous memory (RssAnon: what malloc holds, without
files mapped from disk) is sampled. Its rise during calibration, solving, refit and writing is compared with the bound:
the largest block, its Grams and one batch, and 20 %.
"""

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

HERE = Path(__file__).parent
HIDDEN, FFN, VOCABULARY = 1024, 2816, 4096
LENGTH, BATCH = 512, 4
TEXT = "text"
PERIOD = 0.002
"""Seconds between two samples."""


class Sampler(Thread):
    """Samples this process's RssAnon; keeps, by stage, its highest value above the baseline, in bytes, and its time.

    The baseline is taken, with freed memory given back, when the first stage after the text begins: imports, tokenizer
    and tokens are in it. The text's own peak is above what the process held before.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.after_imports = self.baseline = _anonymous()
        self.peaks: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self._stage, self._start = TEXT, self._now()
        self._done = Event()

    def run(self) -> None:
        """Sample until the end."""
        while not self._done.wait(PERIOD):
            self._sample()

    def enter(self, stage: str) -> None:
        """End the current stage and begin another."""
        above = self._sample()
        self.ends[self._stage] = above
        self.seconds[self._stage], self.processor[self._stage] = (
            round(now - start, 1) for now, start in zip(self._now(), self._start, strict=True)
        )
        if self._stage == TEXT:
            ctypes.CDLL(None).malloc_trim(0)
            self.baseline = _anonymous()
        self._stage, self._start = stage, self._now()

    def announce(self, stage: str) -> Callable[[int, int], None]:
        """What a run calls when a stage begins."""
        self.enter(stage)
        return lambda done, total: None

    def finish(self) -> None:
        """End the last stage and the sampling."""
        self._done.set()
        self.join()
        self.enter("")

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds that have passed, and that the process has computed, by all its threads."""
        return time.perf_counter(), time.process_time()

    def _sample(self) -> int:
        stage, above = self._stage, _anonymous() - self.baseline
        self.peaks[stage] = max(above, self.peaks.get(stage, 0))
        return above


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell a process's anonymous memory")


def make_model(folder: Path, layers: int) -> None:
    """Save a random Llama and a small tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from layershare.calibrate.text import read_documents

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(read_documents("stdlib", "train")[1][:50], VOCABULARY, show_progress=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)


def compress(model: Path, out: Path, blocks: int) -> dict[str, Any]:
    """In the fresh process: run the recipe under the sampler; returns what was measured."""
    import transformers.models.llama.modeling_llama  # noqa: F401, loaded lazily otherwise

    from layershare.recipe import make_recipe
    from layershare.run import run

    recipe = make_recipe(
        {
            "model": str(model),
            "keep": 0.6,
            "of": "targets",
            "device": "cpu",
            "calibration": {"text": "stdlib", "blocks": blocks, "length": LENGTH, "batch_size": BATCH},
        }
    )
    sampler = Sampler()
    sampler.start()

    results = run(recipe, out, announce=sampler.announce)
    sampler.finish()
    return {
        "after_imports": sampler.after_imports,
        "baseline": sampler.baseline,
        "peak_above_baseline": sampler.peaks,
        "left_at_end_above_baseline": sampler.ends,
        "seconds": sampler.seconds,
        "ru_maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": results.before.all.parameters,
    }


def bound() -> dict[str, int]:
    """Bytes of what has to be in memory at once: a block, its Grams, one batch."""
    attention, mlp = 4 * HIDDEN**2, 3 * HIDDEN * FFN
    parts = {
        "block": 2 * (attention + mlp + 2 * HIDDEN),
        "grams": 4 * (3 * HIDDEN**2 + FFN**2),
        # In bfloat16: hidden states before, after, normed and residual; gate, up and their product.
        "batch": BATCH * LENGTH * 2 * (4 * HIDDEN + 3 * FFN),
    }
    return {**parts, "bound": int(1.2 * sum(parts.values()))}


def measure(model: Path, out: Path, blocks: int) -> dict[str, Any]:
    """Compress in a fresh process."""
    command = [sys.executable, __file__, "--child", str(model), str(out), "--blocks", str(blocks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=32, help="calibration blocks of 512 tokens")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, out = options.child
        print(json.dumps(compress(model, out, options.blocks)))
        return
    from layershare.report.results import environment

    with TemporaryDirectory() as temporary:
        model, out = Path(temporary) / "dense", Path(temporary) / "small"
        make_model(model, options.layers)
        measured = measure(model, out, options.blocks)
    stages = [value for stage, value in measured["peak_above_baseline"].items() if stage != TEXT]
    results = {
        "layers": options.layers,
        "blocks": options.blocks,
        "length": LENGTH,
        "batch_size": BATCH,
        "bound": bound(),
        "highest_peak_of_bound": round(max(stages) / bound()["bound"], 3),
        **measured,
        **environment(),
    }
    print(json.dumps(results, indent=1))
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
