"""Write the tables of README.md anew from the results in benchmarks/ (`--check`: fail if they are not up to date)."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def machine(results: dict[str, Any]) -> str:
    """One sentence on where and with what a result was made."""
    computer, versions = results["machine"], results["versions"]
    return (
        f"{results['date'][:10]}, {computer['processor']}, {computer['threads']} of {computer['cores']} cores; "
        f"layershare {versions['layershare']}, torch {versions['torch']}, transformers {versions['transformers']}."
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo(results: dict[str, Any]) -> str:
    """Methods and sizes on the sample model."""
    runs = results["runs"]
    before, measured = runs[0]["before"], runs[0]["evaluation"]
    rows = [
        [
            "original",
            f"{before['all']['parameters']:,}",
            f"{measured['original_perplexity']['value']:.2f}",
            "0",
            "100 %",
        ]
    ]
    for run in runs:
        after, measured = run["after"], run["evaluation"]
        kept = after["targets"]["parameters"] / run["before"]["targets"]["parameters"]
        rows.append(
            [
                f"{run['method']}, {kept:.1%} of targets",
                f"{after['all']['parameters']:,}",
                f"{measured['perplexity']['value']:.2f}",
                f"{measured['kl']:.3f}",
                f"{measured['top1_agreement']:.1%}",
            ]
        )
    header = ["sample model", "parameters", "perplexity", "KL (nats per token)", "top-1 agreement"]
    text = runs[0]["evaluation"]["text"]
    note = f"{text['source']}, {text['blocks']} blocks of {text['length']} tokens, {runs[0]['evaluation']['dtype']}"
    return f"{markdown(header, rows)}\n\n{note}; {machine(results)}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo}


def written(text: str) -> str:
    """README.md with every generated part replaced."""
    for name, make in SECTIONS.items():
        results = json.loads((ROOT / "benchmarks" / name / "results.json").read_text(encoding="utf-8"))
        start, end = f"<!-- {name}: made by `make tables` -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{make(results)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    """Write, or check."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = written(old)
    if "--check" in sys.argv and new != old:
        sys.exit("README.md is not what `make tables` writes.")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
