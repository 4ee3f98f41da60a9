"""The demo: compress the sample model with three methods to one size, compare, and let the last one write Python.

    python -m benchmarks.demo.run [--save benchmarks/demo/results.json]

Calibrated on the Python standard library's source on this machine, measured on modules that neither the calibration nor
the sample model's training has seen. Everything stays in `out/demo`.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from layershare.recipe import make_recipe
from layershare.report.results import environment
from layershare.run import run
from layershare.store import as_json, write_json
from layershare.units import size

OUT = Path("out/demo")
METHODS: dict[str, dict[str, Any]] = {"svd-llm": {}, "basis-sharing": {}, "auto": {"compare": False}}
"""With options; the others' plans, with which auto would compare its own, are in the table anyway."""
KEEP = 0.6
PROMPT = "def read_lines(path):"
# A process of its own that knows nothing of layershare: transformers finds the loader by itself.
TALK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=60, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def compress(method: str) -> dict[str, Any]:
    recipe = make_recipe(
        {
            "model": "sample",
            "method": method,
            "options": METHODS[method],
            "keep": KEEP,
            "of": "targets",
            "calibration": {"text": "stdlib", "blocks": 16, "length": 512, "held_out": 4, "stats": str(OUT / "stats")},
            "evaluation": {"text": "stdlib", "blocks": 16, "length": 512, "dtype": "float32"},
        }
    )
    return as_json(run(recipe, OUT / method))


def table(results: list[dict[str, Any]]) -> Table:
    rows = Table(
        box=SIMPLE_HEAD,  # with less padding, to fit into 80 columns
        padding=(0, 1, 0, 0),
        title="The sample model, calibrated and measured on the standard library's source",
        title_justify="left",
    )
    rows.add_column("model, kept", no_wrap=True)
    for column in ("parameters", "bytes", "perplexity", "KL", "top-1", "seconds"):
        rows.add_column(column, justify="right")
    first = results[0]
    dense = first["before"]["all"]
    perplexity = first["evaluation"]["original_perplexity"]["value"]
    rows.add_row("original", f"{dense['parameters']:,}", size(dense["bytes"]), f"{perplexity:.2f}", "0", "100 %", "")
    for each in results:
        measured, after = each["evaluation"], each["after"]["all"]
        rows.add_row(
            f"{each['method']}, {each['keep']}",
            f"{after['parameters']:,}",
            size(after["bytes"]),
            f"{measured['perplexity']['value']:.2f}",
            f"{measured['kl']:.3f}",
            f"{measured['top1_agreement']:.1%}",
            f"{sum(s for step, s in each['seconds'].items() if step != 'evaluate'):.1f}",
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write the results (JSON) to this file")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    console = Console()
    results = []
    for method in METHODS:
        console.print(f"{method}, keep {KEEP} of the targets …", highlight=False)
        results.append(compress(method))
    console.print(table(results))
    last = OUT / [*METHODS][-1]
    console.print(f"\n{last} is an ordinary Hugging Face folder. Loaded with plain transformers, it continues:\n")
    subprocess.run([sys.executable, "-c", TALK, str(last), PROMPT], check=True)
    if arguments.save:
        # Without the groups: their spectra are of no use here and fill most of the file.
        runs = [{key: value for key, value in each.items() if key != "groups"} for each in results]
        write_json(arguments.save, {"runs": runs, **environment()})


if __name__ == "__main__":
    main()
