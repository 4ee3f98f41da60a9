"""The tables of peers' own code beside ours, for docs/results.md."""

from typing import Any

from benchmarks.methods.tables import OFF_SIZE, added, machine, markdown, require_same
from benchmarks.results import Results

Values = dict[str, Any]
Rows = dict[str, dict[float, Values]]
"""What was run -> fraction kept of the targets -> its result."""
OURS = ("basis-sharing", "svd-llm", "auto without refit", "auto")
"""What of benchmarks/auto stands beside the peers."""
UNMEASURED = "Not measured yet; `python -m benchmarks.peers.run` does it."


def peers_page(peers: Results, auto: Results, model: str) -> str:
    """What peers' code and ours add to the logarithm of perplexity by size, worst first, for each text of a model.

    Raises `ValueError` if they are of different weights or texts.
    """
    rows = {f"{label}, its own code": row for label, row in _rows(peers, model).items()}
    theirs = [each for row in rows.values() for each in row.values()]
    if not theirs:
        return UNMEASURED
    rows |= {f"{label}, ours": row for label, row in _rows(auto, model).items() if label in OURS}
    tests = [test["text"]["source"] for test in theirs[0]["evaluations"]]
    every = [each for row in rows.values() for each in row.values()]
    kinds = {
        "weights": {each["experiment"]["model_fingerprint"] for each in every},
        "calibration texts": {each["calibration"]["tokens_sha256"] for each in every},
        **{f"{test} texts": {_test(each, test)["text"]["tokens_sha256"] for each in every} for test in tests},
    }
    require_same(model, "benchmarks/peers and benchmarks/auto", kinds)
    commits = sorted({f"{each['experiment']['peer']} {each['experiment']['commit'][:7]}" for each in theirs})
    tables = [_table(model, rows, test) for test in tests]
    return "\n\n".join([*tables, f"The peers' commits: {', '.join(commits)}; {machine(theirs[0])}"])


def _rows(every: Results, model: str) -> Rows:
    """The results of a model, named MODEL/LABEL-KEEP."""
    rows: Rows = {}
    for name, result in every.read().items():
        if name.startswith(f"{model}/") and "evaluations" in result:
            rows.setdefault(name.partition("/")[2].rpartition("-")[0], {})[result["experiment"]["keep"]] = result
    return rows


def _table(model: str, rows: Rows, source: str) -> str:
    """The table of one text, in the order of the smallest size that all rows have."""
    keeps = sorted({keep for row in rows.values() for keep in row}, reverse=True)
    common = min(keep for keep in keeps if all(keep in row for row in rows.values()))
    ordered = sorted(rows.items(), key=lambda named: -added(_test(named[1][common], source)))
    cells = [[name, *(_cell(row[keep], source) if keep in row else "" for keep in keeps)] for name, row in ordered]
    test = _test(ordered[0][1][common], source)
    title = (
        f"{model}, what is added to the logarithm of perplexity on {source}, {test['text']['blocks']} blocks of "
        f"{test['text']['length']} tokens; original {test['original_perplexity']['value']:.2f}"
    )
    return f"{title}:\n\n{markdown(['kept of the targets', *(f'{keep:.0%}' for keep in keeps)], cells)}"


def _cell(result: Values, source: str) -> str:
    """What is added, with a mark if the peer left more or less than it was asked for."""
    asked, kept = result["experiment"]["keep"], result.get("kept")
    off = kept is not None and abs(kept["parameters"] / kept["of"] / asked - 1) > OFF_SIZE
    return f"{added(_test(result, source)):+.4f}{' †' if off else ''}"


def _test(result: Values, source: str) -> Values:
    """What was measured on a text."""
    return next(test for test in result["evaluations"] if test["text"]["source"] == source)
