"""Numbers and runs in words, for card and page."""

from collections import Counter

from layershare.calibrate.text import Blocks
from layershare.evaluate.tasks import Score
from layershare.plan.edits import Drop, Merge, Quantize, Slice, in_floats
from layershare.report.results import OWN, REFITTED, HeldOutText, Speed
from layershare.report.runs import Run, in_layers
from layershare.units import count, count_of, duration, percent, size


def story(run: Run) -> str:
    """A run in one sentence: what is left of what, and what that did to perplexity."""
    before, after = (sizes.all.parameters for sizes in (run.results.before, run.results.after))
    of_bytes = " of its bytes" if run.integers else ""
    sentence = f"{run.model} at {percent(run.kept)}{of_bytes}: {count_of(after, before)} parameters"
    if run.evaluation is None or run.evaluation.text is None:
        return sentence
    return f"{sentence}, perplexity {quality(run, 3)} {in_blocks(run.evaluation.text)}"


def quality(run: Run, digits: int = 4) -> str:
    """Perplexity beside the original's: `38.3 instead of 37.1`."""
    ours, theirs = perplexities(run)
    return f"{digits_of(ours, digits)} instead of {digits_of(theirs, digits)}"


def perplexities(run: Run) -> tuple[float, float]:
    """The model's and the original's."""
    measured = run.evaluation
    assert measured is not None
    assert measured.perplexity is not None
    assert measured.original_perplexity is not None
    return measured.perplexity.value, measured.original_perplexity.value


def in_blocks(text: Blocks) -> str:
    """The length that a perplexity is of: `in blocks of 256 tokens`."""
    return f"in blocks of {text.length:,} tokens"


def digits_of(value: float, digits: int = 4) -> str:
    """A measured value to so many digits, trailing zeros kept: `79.0`, `103`."""
    return f"{value:#.{digits}g}".rstrip(".")


def method_of(run: Run) -> str:
    """The method, and whether training and quantizing followed."""
    return run.results.method + run.results.after_words


def quantized(run: Run) -> str:
    """How a model was quantized, in one sentence; nothing for others."""
    done = run.results.quantization
    if done is None:
        return ""
    bases = "" if done.basis_bits == done.bits else f" (bases as {done.basis_bits}-bit ones)"
    kind = f"{done.bits}-bit" if done.scheme == "int" else done.scheme
    how = "rounded" if done.text is None else f"by GPTQ on {blocks(done.text)}"
    return (
        f"All matrices of its blocks are stored as {kind} numbers{bases}, {done.group} with one scale, {how}: "
        f"{size(done.after)} instead of {size(done.before)}"
    )


def healing(run: Run) -> str:
    """How a model was healed, in one sentence."""
    done = run.healing
    assert done is not None
    settings, needs = done.settings, done.needs
    what = {
        "lora": f"adapters of rank {settings['lora']['rank']} (merged afterwards)",
        "factors": "the factors",
        "norms": "the norms",
        "full": "all weights",
        "deltas": "the deltas",
    }[settings["train"]]
    if settings["norms"] and settings["train"] not in ("norms", "full"):
        what += " and the norms"
    loss = {"ce": "cross-entropy", "distill": "distance from the original's predictions"}.get(
        settings["loss"]["kind"], "cross-entropy and distance from the original's predictions"
    )
    replaced = ", the original's blocks replaced step by step" if settings["replace"] else ""
    return (
        f"After the compression, {what} ({count(needs['trained'])} parameters) were trained on "
        f"{count(needs['tokens'])} tokens of {done.text.source} in {needs['steps']:,} steps, for {loss}{replaced}"
    )


def healed(run: Run) -> list[tuple[str, str, str]]:
    """What was measured before and after healing: name, then both values in words."""
    assert run.healing is not None
    stages, rows = run.healing.evaluation, []
    if stages and (text := stages.after.text) is not None:
        before, after = stages.before, stages.after
        assert before.perplexity is not None
        assert after.perplexity is not None
        old, new = (digits_of(each.value) for each in (before.perplexity, after.perplexity))
        rows.append((f"perplexity {in_blocks(text)}", old, new))
        if after.kl is not None:
            rows.append(("KL divergence from the original", f"{before.kl:.3g}", f"{after.kl:.3g}"))
    found = [entry["held_out_perplexity"] for entry in run.healing.log if "held_out_perplexity" in entry]
    name = f"perplexity of held-out training text {in_blocks(run.healing.text)}"
    rows.append((name, digits_of(found[0]), digits_of(min(found))))
    return rows


def held(speed: Speed) -> str:
    """The memory that models took while their speed was measured, in one sentence."""
    what = "an engine held at most" if speed.of_an_engine else "the weights take"
    beside = "" if speed.original_memory is None else f" (the original's: {size(speed.original_memory)})"
    return f"In memory {what} {size(speed.memory)}{beside}."


def made_in(seconds: dict[str, float]) -> str:
    """How long the compression took, evaluation aside: `47 s`, `3.5 min`, `2.1 h`."""
    return duration(sum(value for step, value in seconds.items() if step != "evaluate"))


def sizes(run: Run) -> list[tuple[str, str, str, float]]:
    """Size before and after: what is counted, both in words, and the fraction that is left."""
    before, after = run.results.before, run.results.after
    rows = (
        ("parameters", before.all.parameters, after.all.parameters, count),
        ("parameters of the compressed matrices", before.targets.parameters, after.targets.parameters, count),
        ("bytes on disk", before.all.bytes, after.all.bytes, size),
        ("multiplications per token", before.all.multiplications, after.all.multiplications, count),
    )
    return [(name, words(old), words(new), new / old) for name, old, new, words in rows]


def edits(run: Run) -> str:
    """What the plan does, counted: `15 bases shared by 2 layers each; 40 matrices with own factors`."""
    parts = _shared(run, ("share",), "basis", "bases")
    parts += [f"{part}, with deltas" for part in _shared(run, ("anchor", "delta"), "weight", "weights")]
    cells = run.cells.values()
    if own := sum(cell.kind == "own" for cell in cells):
        parts.append(f"{_matrices(own)} with own factors")
    if dense := sum(cell.kind == "dense" and cell.bits is None for cell in cells):
        parts.append(f"{_matrices(dense)} unchanged")
    if stored := [cell.bits for cell in cells if cell.bits is not None]:
        bits = f"{min(stored)} to {max(stored)}" if min(stored) < max(stored) else f"{stored[0]}"
        parts.append(f"{_matrices(len(stored))} stored as integers of {bits} bits a number")
    for edit in in_floats(run.edits):
        if isinstance(edit, Slice):
            parts.append(f"all hidden states sliced to {edit.width:,} components")
            continue
        assert not isinstance(edit, Quantize)
        layers = in_layers(edit.layers)
        if isinstance(edit, Drop):
            parts.append(f"{layers} dropped" if edit.part == "block" else f"{edit.part} of {layers} dropped")
        elif isinstance(edit, Merge):
            parts.append(f"{layers} merged into layer {edit.into}")
    return "; ".join(parts) or "nothing was changed"


def _matrices(count: int) -> str:
    return f"{count} {'matrices' if count > 1 else 'matrix'}"


def _shared(run: Run, kinds: tuple[str, ...], one: str, many: str) -> list[str]:
    """How many layers, or matrices of several roles, share one of these, for each number of them."""
    groups = {cell.places for cell in run.cells.values() if cell.kind in kinds}
    counts = Counter((len(places), len({place.role for place in places}) > 1) for places in groups)
    return [
        f"{number} {many if number > 1 else one} shared by {n} {'matrices' if mixed else 'layers'}"
        f"{' each' * (number > 1)}"
        for (n, mixed), number in sorted(counts.items())
    ]


def calibration(run: Run) -> str:
    """The text that the model was compressed for."""
    text = run.results.calibration
    return f"{blocks(text)}, seed {text.seed}" if text else "none: the method needs no text"


def compared(text: HeldOutText) -> str:
    """What was found on held-out text before the result was written: every candidate's divergence."""
    names = {OWN: "its own plan", REFITTED: "fitted again"}
    expected = {} if text.expected is None else {OWN: f" ({text.expected:.2g} expected)"}
    found = ", ".join(f"{names.get(x, x)} {kl:.3g}{expected.get(x, '')}" for x, kl in text.kl.items())
    return f"On {text.blocks:,} held-out blocks of {text.length:,} tokens, KL from the original: {found} nats per token"


def blocks(text: Blocks) -> str:
    """A text and how much of it: `stdlib, 32 blocks of 256 tokens`."""
    return f"{text.source}, {text.blocks:,} blocks of {text.length:,} tokens"


def options(run: Run) -> str:
    """The method's options that are set: `group_size 2`."""
    given = {key: value for key, value in (run.results.options or {}).items() if value is not None and value != []}
    return ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in given.items()
    )


def loading(run: Run) -> str:
    """What it takes to load the result, and what becomes of programs that cannot."""
    if run.ordinary:
        return "It is an ordinary checkpoint, which loads without layershare, too."
    trains = "LoRA takes" if run.integers else "It trains like any model; PEFT and TRL take"
    needed = (
        f"layershare must be installed, not imported. {trains} the usual names "
        "(`q_proj`, …), whose adapters sit on a layer's own factor."
    )
    if run.sliced:
        return f"{needed} Its hidden states are narrower than an ordinary model's: it cannot be made one."
    return (
        f"{needed} `layershare export FOLDER -o DENSE --to dense` writes an ordinary checkpoint for other programs, "
        "as large as the original again."
    )


def scores(run: Run) -> list[tuple[str, str, str]]:
    """Zero-shot scores: task and metric, then the original's and the model's in words."""
    return [
        (f"{task}, {metric}", score(reached), score(ours.scores[metric]))
        for task, (ours, theirs) in run.tasks.items()
        for metric, reached in theirs.scores.items()
    ]


def score(measured: Score) -> str:
    """A score with its standard error: `0.381 ± 0.012`."""
    return f"{measured.value:.3f}" + (f" ± {measured.stderr:.3f}" if measured.stderr else "")
