"""Speed and memory of training a dense model and compressed ones of the same shape, all with random weights.

    python -m benchmarks.heal.speed [--shape llama-1b] [--only NAME] [--results speed.json]

Writes speed.json beside this file. The same Trainer trains each model on the same blocks, one after the other in one
process. Trainings that have a result there are not run again.
"""

import argparse
import gc
import json
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from layershare.healing.job import HealJob, prepare_healing
from layershare.healing.settings import Healing
from layershare.healing.training import train
from layershare.methods import make_method, plan_with
from layershare.model.arch import Spec
from layershare.model.describe import describe
from layershare.model.source import SAMPLE, read_tokenizer, resolve
from layershare.model.weights import Weights
from layershare.plan.layout import checkpoint_tensors
from layershare.plan.plan import Plan
from layershare.progress import silent
from layershare.recipe import make_as, make_recipe
from layershare.report.results import environment
from layershare.solve.apply import Factored
from layershare.solve.write import write_model
from layershare.store import write_json

HERE = Path(__file__).parent
Values = dict[str, Any]
SHAPES: dict[str, Values] = {
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
}
"""Llama-3.2-1B's shape, and one for a test."""
COMPRESSED: dict[str, Values] = {
    "basis-sharing": {"method": "basis-sharing", "keep": 0.8},
    "delta": {"method": "delta", "keep": 0.88},
}
LORA = {"train": "lora", "lora": {"targets": "linears"}}
REPLACEMENT = {"train": "deltas", "norms": True, "loss": {"kind": "both"}, "replace": {}}
COMPILED = {"compile": True}
TRAININGS: dict[str, tuple[str, Values]] = {
    "dense, full": ("dense", {"train": "full"}),
    "dense, LoRA": ("dense", LORA),
    "basis-sharing, full": ("basis-sharing", {"train": "full"}),
    "basis-sharing, factors": ("basis-sharing", {"train": "factors"}),
    "basis-sharing, factors, distilled": ("basis-sharing", {"train": "factors", "loss": {"kind": "distill"}}),
    "basis-sharing, LoRA": ("basis-sharing", LORA),
    "delta, deltas": ("delta", {"train": "deltas"}),
    "delta, replacement": ("delta", REPLACEMENT),
    "dense, full, compiled": ("dense", {"train": "full", **COMPILED}),
    "basis-sharing, full, compiled": ("basis-sharing", {"train": "full", **COMPILED}),
    "basis-sharing, factors, compiled": ("basis-sharing", {"train": "factors", **COMPILED}),
}
"""Name -> which model, and the settings beside `common`."""


def common(length: int, steps: int, rows: int) -> Values:
    """What all trainings share: text, batch, and measuring at both ends only."""
    return {
        "text": {"text": "stdlib", "length": length, "tokens": steps * rows * length, "held_out": rows},
        "batch_size": rows,
        "evaluate_every": steps,
        "save_every": steps,
        "seed": 0,
    }


class Random(Factored):
    """A plan carried out with random factors: what is made of what does not matter to speed and memory."""

    def __init__(self, spec: Spec, plan: Plan, weights: Weights, folder: Path) -> None:
        super().__init__(spec, plan, weights, folder, {})
        self.made, self.dense = checkpoint_tensors(spec, plan.edits), weights.model.state_dict()

    def tensor(self, name: str) -> Tensor:
        """A tensor of the dense model where it has one of this name and shape, or a random one."""
        shape, dtype = self.made[name]
        dense = self.dense.get(name)
        if dense is not None and dense.shape == torch.Size(shape):
            return dense.to(dtype)
        return torch.empty(shape, dtype=dtype).normal_(std=0.02)


def make_models(shape: str, work: Path) -> None:
    """The dense model and the compressed ones, in folders of `work`."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    torch.set_default_dtype(torch.float32)
    tokenizer = read_tokenizer(resolve(SAMPLE))
    model.save_pretrained(work / "dense")
    tokenizer.save_pretrained(work / "dense")
    spec = describe(model)
    for name, values in COMPRESSED.items():
        recipe = make_recipe({"model": str(work / "dense"), **values})
        plan = plan_with(spec, recipe.method, make_method(recipe.method, {}), recipe.keep, recipe.of)
        (work / name).mkdir(parents=True)
        with TemporaryDirectory(dir=work) as scratch:
            write_model(Random(spec, plan, Weights.of(model), Path(scratch)), recipe, tokenizer, work / name)


def prepare(name: str, setting: Values, work: Path) -> HealJob:
    """A training by its name."""
    model, settings = TRAININGS[name]
    values = common(setting["length"], setting["steps"], setting["rows"]) | settings | {"model": str(work / model)}
    if "loss" in settings:
        values["teacher"] = str(work / "dense")
    return prepare_healing(make_as(Healing, values))


def measure(name: str, setting: Values, work: Path) -> Values:
    """Train; speed, peak memory on the GPU and what was expected, in bytes."""
    job = prepare(name, setting, work)
    with TemporaryDirectory(dir=work) as scratch:
        needs = job.needs(job.student())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        teacher = job.load_teacher(Path(scratch) / "teacher", silent(""))
        trained = train(job, teacher, Path(scratch), silent(""), lambda line: print(f"  {line}", flush=True))
    return {
        "settings": TRAININGS[name][1],
        "parameters": needs.parameters,
        "trained": needs.trained,
        "tokens_per_second": round(trained.speed, 1),
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "expected_memory": needs.memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b", help="of the model")
    parser.add_argument("--length", type=int, default=1024, help="tokens per block")
    parser.add_argument("--rows", type=int, default=8, help="blocks per step")
    parser.add_argument("--steps", type=int, default=16, help="of each training")
    parser.add_argument("--only", default="", help="run trainings with this in their names")
    parser.add_argument("--results", type=Path, default=HERE / "speed.json", help="file of the results")
    parser.add_argument("--work", type=Path, default=Path("build/speed"), help="folder of the models")
    parser.add_argument("--expect", action="store_true", help="only estimate memory anew; needs no GPU")
    options = parser.parse_args()
    logging.disable_progress_bar()
    options.work /= options.shape
    setting = {name: getattr(options, name) for name in ("shape", "length", "rows", "steps")}
    found: Values = {"setting": setting, **environment("peft"), "trainings": {}}
    if options.results.is_file():
        old = json.loads(options.results.read_text(encoding="utf-8"))
        same = ("setting",) if options.expect else ("setting", "machine", "versions")
        if all(old[key] == found[key] for key in same):
            found = old
    if not options.work.is_dir():
        part = options.work.with_name(f"{options.shape}.part")
        shutil.rmtree(part, ignore_errors=True)
        make_models(options.shape, part)
        part.rename(options.work)
    if options.expect:
        for name, each in found["trainings"].items():
            job = prepare(name, setting, options.work)
            each["expected_memory"] = job.needs(job.student()).memory
            write_json(options.results, found)
        return
    for name in TRAININGS:
        if options.only in name and name not in found["trainings"]:
            start = time.perf_counter()
            found["trainings"][name] = measure(name, setting, options.work)
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
            write_json(options.results, found)


if __name__ == "__main__":
    main()
