"""Tables of the experiments in benchmarks/methods: by model for docs/results.md, by method for docs/papers.md."""

from math import inf, log
from typing import Any

from benchmarks.results import Results
from layershare.methods import METHODS
from layershare.plan.budget import parse_keep
from layershare.units import size

Values = dict[str, Any]
OFF_SIZE = 0.005
"""How far from the common size a result may be without a mark, as a fraction."""
UNMEASURED = "Not measured yet; `make bench` does it."


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(results: Values) -> str:
    """One sentence on where and with what a result was made."""
    computer, versions = results["machine"], results["versions"]
    return (
        f"{results['date'][:10]}, {computer['processor']}, {computer['threads']} of {computer['cores']} cores; "
        f"layershare {versions['layershare']}, torch {versions['torch']}, transformers {versions['transformers']}."
    )


def read(every: Results, model: str) -> list[Values]:
    """The results of a model, by size and method.

    Raises `ValueError` if they are not comparable: of different weights, or on different texts.
    """
    places = {method: place for place, method in enumerate(METHODS)}
    found = [result for name, result in every.read().items() if name.startswith(f"{model}/")]
    found = [each for each in found if each["experiment"].get("method") in places]
    found.sort(key=lambda each: (-each["experiment"]["keep"], places[each["experiment"]["method"]]))
    require_same(
        model,
        "`make bench`",
        {
            "weights": {each["experiment"]["model_fingerprint"] for each in found},
            "calibration texts": {each["calibration"]["tokens_sha256"] for each in found if each.get("calibration")},
            "test texts": {tuple(t["text"]["tokens_sha256"] for t in each["evaluations"]) for each in done(found)},
        },
    )
    return found


def require_same(model: str, command: str, kinds: dict[str, set[Any]]) -> None:
    """Raise `ValueError` if there is more than one of a kind, so that the results of a model are not comparable."""
    for what, found in kinds.items():
        if len(found) > 1:
            raise ValueError(f"The results of {model} are of different {what}; run {command} again.")


def done(results: list[Values]) -> list[Values]:
    """Those that were not refused."""
    return [each for each in results if "refused" not in each]


def off_size(result: Values) -> bool:
    """Whether a result is not within 0.5 % of the size that all methods of its table were asked for."""
    wanted = parse_keep(result["experiment"]["recipe"]["keep"]).parameters
    assert wanted is not None
    return abs(result["after"]["all"]["parameters"] / wanted - 1) > OFF_SIZE


def model_page(every: Results, model: str) -> str:
    """Perplexity by method and size on every text, zero-shot tasks, then one table of everything per size."""
    results = read(every, model)
    if not done(results):
        return UNMEASURED
    parts = [_perplexities(results, test) for test in range(len(done(results)[0]["evaluations"]))]
    parts += [_tasks(done(results)), _refusals(results)]
    keeps = sorted({each["experiment"]["keep"] for each in done(results)}, reverse=True)
    parts += [_everything([each for each in done(results) if each["experiment"]["keep"] == keep]) for keep in keeps]
    calibration = every.read()[f"{model}/calibration"]
    text = next((each["calibration"] for each in done(results) if each["calibration"]), None)
    if text:
        parts.append(
            f"Calibrated on {text['source']}, {text['blocks']} blocks of {text['length']} tokens, once for all rows: "
            f"{calibration['seconds']:.0f} seconds, not counted above. {machine(done(results)[-1])}"
        )
    return "\n\n".join(part for part in parts if part)


def _perplexities(results: list[Values], test: int) -> str:
    text = done(results)[0]["evaluations"][test]["text"]
    original = done(results)[0]["evaluations"][test]["original_perplexity"]["value"]
    keeps = sorted({each["experiment"]["keep"] for each in results}, reverse=True)
    rows = [
        [method, *(_perplexity(results, method, keep, test) for keep in keeps)]
        for method in dict.fromkeys(each["experiment"]["method"] for each in results)
    ]
    title = (
        f"Perplexity on {text['source']}, {text['blocks']} blocks of {text['length']} tokens; original {original:.2f}"
    )
    header = ["kept of the targets", *(f"{keep:.0%}" for keep in keeps)]
    note = (
        "\n\n† not within 0.5 % of the size of its column." if any("†" in cell for row in rows for cell in row) else ""
    )
    return f"{title}:\n\n{markdown(header, rows)}{note}"


def _perplexity(results: list[Values], method: str, keep: float, test: int) -> str:
    for each in results:
        if (each["experiment"]["method"], each["experiment"]["keep"]) == (method, keep):
            if "refused" in each:
                return "refused"
            return f"{each['evaluations'][test]['perplexity']['value']:.4g}{' †' if off_size(each) else ''}"
    return ""


def models_page(every: Results, folder: str) -> str:
    """Perplexity of several models on their first text, a column per model and size, the worst first."""
    columns: dict[tuple[str, float], dict[str, str]] = {}
    notes, worst = [], {"original": inf}
    for model in dict.fromkeys(name.split("/")[0] for name in every.read()):
        found = [each for name, each in every.read().items() if name.startswith(f"{model}/")]
        found = [each for each in found if "method" in each["experiment"]]
        first = require_comparable(done(found), model, folder)
        text, original = first["text"], first["original_perplexity"]["value"]
        for each in sorted(found, key=lambda each: -each["experiment"]["keep"]):
            cells = columns.setdefault((model, each["experiment"]["keep"]), {"original": f"{original:.4g}"})
            cells[each["experiment"]["method"]] = _added(each, 0)
            value = inf if "refused" in each else each["evaluations"][0]["perplexity"]["value"]
            worst.setdefault(each["experiment"]["method"], value)
        blocks = f"{text['blocks']} blocks of {text['length']} tokens"
        notes.append(f"{model}: perplexity on {text['source']}, {blocks}; {machine(done(found)[-1])}")
    header = ["kept of the targets", *(f"{model}, {keep:.0%}" for model, keep in columns)]
    order = sorted(worst, key=lambda method: -worst[method])
    rows = [[method, *(cells.get(method, "") for cells in columns.values())] for method in order]
    mark = "† not within 0.5 % of the size of its column."
    marks = [mark] if any("†" in cell for row in rows for cell in row) else []
    return "\n\n".join([markdown(header, rows), *marks, *notes])


def require_comparable(found: list[Values], model: str, folder: str) -> Values:
    """What was measured first on a model; raises `ValueError` if its results are of other weights or texts."""
    require_same(
        model,
        f"benchmarks/{folder}",
        {
            "weights": {each["experiment"]["model_fingerprint"] for each in found},
            "test texts": {each["evaluations"][0]["text"]["tokens_sha256"] for each in found},
        },
    )
    return found[0]["evaluations"][0]


def added(measured: Values) -> float:
    """What was added to the logarithm of the original's perplexity."""
    return log(measured["perplexity"]["value"] / measured["original_perplexity"]["value"])


def _added(result: Values, test: int) -> str:
    """Perplexity, what is added to its logarithm, and a mark if it is not of the size of its column."""
    if "refused" in result:
        return "refused"
    measured = result["evaluations"][test]
    return f"{measured['perplexity']['value']:.4g} ({added(measured):+.4f}){' †' if off_size(result) else ''}"


def variants_page(every: Results, model: str, folder: str) -> str:
    """Perplexity on each text by what was done and size, worst first, with what is added to its logarithm."""
    found = [each for name, each in every.read().items() if name.startswith(f"{model}/")]
    found = done([each for each in found if "method" in each["experiment"]])
    if not found:
        return UNMEASURED
    require_comparable(found, model, folder)
    keeps = sorted({each["experiment"]["keep"] for each in found}, reverse=True)
    tables = []
    for number, test in enumerate(found[0]["evaluations"]):
        text, original = test["text"], test["original_perplexity"]["value"]
        values: dict[str, dict[float, float]] = {}
        cells: dict[str, dict[float, str]] = {}
        for each in found:
            name, keep = each["experiment"]["method"], each["experiment"]["keep"]
            values.setdefault(name, {})[keep] = each["evaluations"][number]["perplexity"]["value"]
            cells.setdefault(name, {})[keep] = _added(each, number)
        worst_first = sorted(values, key=lambda name: -values[name].get(keeps[-1], 0))
        rows = [[name, *(cells[name].get(keep, "") for keep in keeps)] for name in worst_first]
        title = (
            f"{model}, perplexity on {text['source']}, {text['blocks']} blocks of {text['length']} tokens; original "
            f"{original:.2f}; in brackets what is added to its logarithm"
        )
        header = ["kept of the targets", *(f"{keep:.0%}" for keep in keeps)]
        tables.append(f"{title}:\n\n{markdown(header, rows)}")
    return "\n\n".join([*tables, machine(found[0])])


def _everything(results: list[Values]) -> str:
    """All figures at one size, the result that is nearest to the original first."""
    before, first = results[0]["before"], results[0]["evaluations"]
    texts = [each["text"]["source"] for each in first]
    rows = [
        [
            "original",
            f"{before['all']['parameters']:,}",
            "100 %",
            size(before["all"]["bytes"]),
            f"{before['all']['multiplications'] / 1e6:.2f} M",
            *(f"{each['original_perplexity']['value']:.4g}" for each in first),
            "0",
            "100 %",
            "",
            "",
        ]
    ]
    for each in sorted(results, key=lambda each: each["evaluations"][0]["kl"]):
        after, measured = each["after"], each["evaluations"]
        rows.append(
            [
                each["experiment"]["method"] + (" †" if off_size(each) else ""),
                f"{after['all']['parameters']:,}",
                f"{after['targets']['parameters'] / before['targets']['parameters']:.1%}",
                size(after["all"]["bytes"]),
                f"{after['all']['multiplications'] / 1e6:.2f} M",
                *(f"{test['perplexity']['value']:.4g}" for test in measured),
                f"{measured[0]['kl']:.3f}",
                f"{measured[0]['top1_agreement']:.1%}",
                f"{sum(each['seconds'].values()):.1f}",
                f"{(each['peak_memory'] - each['memory_at_start']) / 1e6:.0f} MB",
            ]
        )
    header = ["", "parameters", "of targets", "bytes", "multiplications", *texts, "KL", "top-1", "seconds", "memory"]
    return f"Kept {results[0]['experiment']['keep']:.0%} of the targets:\n\n{markdown(header, rows)}"


def _tasks(results: list[Values]) -> str:
    measured = [each for each in results if "tasks" in each["evaluations"][0]]
    if not measured:
        return ""
    first = measured[0]["evaluations"][0]["original_tasks"]

    def row(name: str, tasks: Values) -> list[str]:
        scores = [tasks[task]["scores"]["acc"] for task in first]
        return [name, *(f"{score['value']:.2f}{' ≈' if score['near_chance'] else ''}" for score in scores)]

    rows = [
        ["guessing", *(f"{task['chance']:.2f}" for task in first.values())],
        row("original", first),
        *(
            row(f"{each['experiment']['method']}, {each['experiment']['keep']:.0%}", each["evaluations"][0]["tasks"])
            for each in measured
        ),
    ]
    counts = {task["rows"] for task in first.values()}
    return (
        f"Zero-shot accuracy on {min(counts)} rows per task (≈: within two standard errors of guessing, so it says "
        f"nothing about the model):\n\n{markdown(['', *first], rows)}"
    )


def _refusals(results: list[Values]) -> str:
    lines = {f"- {each['experiment']['method']}: {each['refused']}" for each in results if "refused" in each}
    return "Refused:\n\n" + "\n".join(sorted(lines)) if lines else ""


def measured_method(every: Results, method: str) -> str:
    """Perplexity of one method on every model's first text, with how many times the original's it is."""
    rows, keeps = [], set()
    for model in sorted({name.partition("/")[0] for name in every.read()}):
        results = [each for each in read(every, model) if each["experiment"]["method"] == method]
        if not done(results):
            continue
        cells = {}
        for each in done(results):
            test = each["evaluations"][0]
            value, dense = test["perplexity"]["value"], test["original_perplexity"]["value"]
            cells[each["experiment"]["keep"]] = f"{value:.4g} (× {value / dense:.3g}){' †' if off_size(each) else ''}"
        text = done(results)[0]["evaluations"][0]
        rows.append((f"{model}, {text['text']['source']}", text["original_perplexity"]["value"], cells))
        keeps |= set(cells)
    if not rows:
        return UNMEASURED
    ordered = sorted(keeps, reverse=True)
    header = ["measured here", "original", *(f"{1 - keep:.0%} removed" for keep in ordered)]
    return markdown(
        header, [[name, f"{dense:.4g}", *(c.get(k, "refused") for k in ordered)] for name, dense, c in rows]
    )
