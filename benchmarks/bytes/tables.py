"""The table of bytes, for docs/quantizing.md."""

from typing import Any

from benchmarks.methods.tables import added, machine, markdown, require_same
from benchmarks.results import Results

UNMEASURED = "Not measured yet; `python -m benchmarks.bytes.run` does it."


def bytes_page(results: Results, model: str) -> str:
    """A model at every size and precision, by the bytes of its matrices, and what that was measured on."""
    found = [each for name, each in results.read().items() if name.startswith(f"{model}/")]
    if not found:
        return UNMEASURED
    texts = {
        "calibration texts": {str(each["experiment"]["recipe"]["calibration"]) for each in found},
        "test texts": {each["evaluation"]["text"]["tokens_sha256"] for each in found},
    }
    require_same(model, "`python -m benchmarks.bytes.run`", texts)
    found.sort(key=lambda each: -each["bytes"])
    most, rows, best = found[0]["bytes"], [], float("inf")
    for each in reversed(found):
        quality = each["evaluation"]
        loss = added(quality)
        mark = "**" if loss < best else ""
        best = min(best, loss)
        row = [
            _model(each),
            _bits(each),
            f"{each['bytes'] / 1e6:.2f} MB",
            f"{16 * each['bytes'] / most:.2f}",
            f"{mark}{loss:+.4f}{mark}",
            f"{quality['kl']:.4f}",
        ]
        rows.insert(0, row)
    header = ["model", "bits", "matrices", "bits for each number of the original", "log of perplexity", "KL (nats)"]
    text, made = found[0]["evaluation"]["text"], found[0]["experiment"]["recipe"]["calibration"]
    note = (
        f"{model}: {text['source']}, {text['blocks']} blocks of {text['length']} tokens; compressed and quantized by "
        f"GPTQ for {made['blocks']} blocks of {made['length']} of {made['text']}, in groups of 64 (nvfp4 16, mxfp4 "
        "32); nearest: rounded without a text. Bold: nothing that is as small or smaller is better"
    )
    return f"{markdown(header, rows)}\n\n{note}; {machine(found[0])}"


def _model(row: dict[str, Any]) -> str:
    """What was quantized, in words."""
    what = "original" if row["keep"] == 1 else f"`auto`, {row['keep']:.0%} kept"
    return ", ".join(part for part in (what, row.get("label"), "planned" * ("planned" in row)) if part)


def _bits(row: dict[str, Any]) -> str:
    """The bits of its numbers, in words."""
    if "scheme" in row or "rounding" in row:
        return row.get("scheme") or f"{row['bits']}, nearest"
    if "planned" in row:
        return f"{row['planned'][0]} to {row['planned'][-1]}"
    return str(row["bits"]) if row["basis_bits"] == row["bits"] else f"{row['bits']}, bases {row['basis_bits']}"
