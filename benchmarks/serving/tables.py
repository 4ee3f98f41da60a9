"""The tables of serving speed, for docs/serving.md."""

from benchmarks.methods.tables import machine, markdown
from benchmarks.results import Results

UNMEASURED = "Not measured yet; `python -m benchmarks.serving.run` does it."


def serving_page(every: Results, engine: str) -> str:
    """By method and size: how many times as fast as the original each phase is at each batch size."""
    found = {name.partition("/")[2]: each for name, each in every.read().items() if name.startswith(f"{engine}/")}
    if not found:
        return UNMEASURED
    rows, first = [], next(iter(found.values()))
    for name, each in sorted(found.items(), key=lambda item: (-item[1]["experiment"]["keep"], item[0])):
        label, _, _ = name.rpartition("-")
        cells = [f"{rate['ratio']:.2f}" for rate in each["rates"]]
        memory = f"{each['memory'] / each['original_memory']:.2f}"
        rows.append([label, f"{each['experiment']['keep']:.0%}", f"{each['multiplications']:.0%}", *cells, memory])
    phases = [f"{rate['phase']}, batch {rate['batch']}" for rate in first["rates"]]
    original = [f"{rate['original']:,.0f}" for rate in first["rates"]]
    header = ["", "kept", "multiplications", *phases, "memory"]
    note = (
        f"{first['engine']}, {first['dtype']} on {first['device']}: prompts of {first['prompt']} tokens and "
        f"{first['new']} new ones, medians of {first['rounds']} rounds; tokens per second of the original, in "
        f"the order of the columns: {', '.join(original)}"
    )
    return f"{markdown(header, rows)}\n\n{note}; {machine(first)}"
