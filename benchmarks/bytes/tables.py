"""The tables and charts of bytes, for docs/bytes.md."""

from typing import Any

from plotly import graph_objects as go

from benchmarks.methods.tables import added, machine, markdown, require_same
from benchmarks.results import Results
from layershare.report.figures import PALETTE
from layershare.report.svg import draw

_ATTRIBUTES = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="9" fill="#808080" width="620"'
_STYLE = "<style>.rule{stroke:#8080804d}.line{fill:none;stroke-width:1.5}</style>"
_LINES = BITS, NUMBERS, FEW, BOTH = (
    "fewer bits",
    "fewer numbers",
    "fewer numbers of 4 bits",
    "ranks and bits planned together",
)
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
            f"{each['keep']:.0%}",
            f"{mark}{loss:+.4f}{mark}",
            f"{quality['kl']:.4f}",
        ]
        rows.insert(0, row)
    size = ["matrices", "bits for each number of the original", "multiplications"]
    header = ["model", "bits", *size, "log of perplexity", "KL (nats)"]
    text, made = found[0]["evaluation"]["text"], found[0]["experiment"]["recipe"]["calibration"]
    note = (
        f"{model}: {text['source']}, {text['blocks']} blocks of {text['length']} tokens; compressed and quantized by "
        f"GPTQ for {made['blocks']} blocks of {made['length']} of {made['text']}, in groups of 64 (nvfp4 16, mxfp4 "
        "32); nearest: rounded without a text. Bold: nothing that is as small or smaller is better"
    )
    return f"{markdown(header, rows)}\n\n{note}; {machine(found[0])}"


def bytes_chart(results: Results, model: str) -> str:
    """How far a model gets from the original by the bits for each of its numbers, as SVG: a line for each way."""
    found = [each for name, each in results.read().items() if name.startswith(f"{model}/")]
    most, figure = max(each["bytes"] for each in found), go.Figure()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        if (line := _line(row)) is not None:
            lines.setdefault(line, []).append((16 * row["bytes"] / most, row["evaluation"]["kl"]))
    for name, colour in zip(_LINES, PALETTE, strict=False):
        if name not in lines:
            continue
        x, y = zip(*sorted(lines[name]), strict=True)
        figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line={"color": colour})
    figure.update_xaxes(title="bits for each number of the original")
    figure.update_yaxes(type="log")
    return draw(figure, 480).replace("<svg ", f"<svg {_ATTRIBUTES} ", 1).replace(">", f">{_STYLE}", 1) + "\n"


def _line(row: dict[str, Any]) -> str | None:
    """The line that a result is on; `None` if on none."""
    if "planned" in row:  # fitted again, as compressing does by itself
        fitted = row["experiment"]["recipe"].get("refit") is not False
        return BOTH if fitted and row["keep"] < 1 else None
    if row.get("label") or {"scheme", "rounding"} & row.keys() or row["bits"] != row["basis_bits"]:
        return None
    if row["keep"] == 1:
        return BITS
    return {16: NUMBERS, 4: FEW}.get(row["bits"])


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
