"""The table of bytes, for docs/quantizing.md."""

import json
from math import log
from pathlib import Path

from benchmarks.methods.tables import machine, markdown

UNMEASURED = "Not measured yet; `python -m benchmarks.bytes.run` does it."


def bytes_page(file: Path) -> str:
    """Every model by the bytes of its matrices, and what they were measured on."""
    if not file.is_file():
        return UNMEASURED
    results = json.loads(file.read_text(encoding="utf-8"))
    rows, most = sorted(results["rows"], key=lambda row: -row["bytes"]), max(row["bytes"] for row in results["rows"])
    table = [
        [
            "original" if row["keep"] == 1 else f"`auto`, {row['keep']:.0%} kept",
            str(row["bits"]),
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{16 * row['bytes'] / most:.2f}",
            f"{log(row['perplexity'] / row['original_perplexity']):+.4f}",
            f"{row['kl']:.4f}",
        ]
        for row in rows
    ]
    header = ["model", "bits", "matrices", "bits for each number of the original", "log of perplexity", "KL (nats)"]
    text, made = results["text"], results["calibration"]
    note = (
        f"{text['source']}, {text['blocks']} blocks of {text['length']} tokens; compressed and quantized by GPTQ for "
        f"{made['blocks']} others, in groups of {results['group']}"
    )
    return f"{markdown(header, table)}\n\n{note}; {machine(results)}"
