"""The Python interface: what the command line does, on models in memory."""

import copy
import os
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.bars import shown
from layershare.calibrate.text import Source, as_source, block_length, load_text, name_of
from layershare.device import device_of, dtype_of
from layershare.errors import LayershareError, unknown
from layershare.evaluate.divergence import Evaluation, evaluate
from layershare.evaluate.evaluator import load_evaluator
from layershare.evaluate.generate import require_context
from layershare.evaluate.speed import Workload, generate_seconds, measure_speed, weight_bytes
from layershare.healing.settings import Healing, Loss, Optimizer, TrainingText, make_healing
from layershare.methods import make_method, plan_with
from layershare.model.describe import describe
from layershare.model.given import require_model, require_runnable
from layershare.model.hub import load
from layershare.model.layers import ComposedLinear
from layershare.model.original import copy_side_files, files_of, source_of
from layershare.model.source import read_config, read_tokenizer, resolve, tokenizer_of
from layershare.model.vocabulary import require_same_vocabulary
from layershare.model.weights import Weights
from layershare.plan.evidence import Evidence
from layershare.plan.plan import Plan
from layershare.progress import Announce, silent
from layershare.recipe import Calibration, EvaluationSettings, Recipe, make_as, make_recipe
from layershare.report.results import Environment, Evaluated, Speed
from layershare.run import run
from layershare.serve.speed import engine as vllm_engine
from layershare.serve.speed import vllm_package
from layershare.values import Scheme

ENGINES = ("transformers", "vllm")
"""What `bench` can run models in."""


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = Recipe.method,
    keep: float | str = Recipe.keep,
    of: str = Recipe.of,
    text: Source = Calibration.text,
    blocks: int = Calibration.blocks,
    length: int | None = None,
    seed: int = Calibration.seed,
    batch_size: int = Calibration.batch_size,
    stats: str | Path | None = None,
    plan: str | Path | None = None,
    refit: Literal["auto"] | bool = Recipe.refit,
    effort: str = Recipe.effort,
    refine: dict[str, Any] | None = None,
    distill: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A smaller model; the given one is not changed.

    `keep`: a fraction (`0.8`), parameters (`"5.4B"`) or bytes (`"11GB"`), counted `of="all"` parameters or of the
    `"targets"` alone. `text`: what to compress for, as `load_text` takes it, in `blocks` blocks of `length` tokens
    (`None`: the model's context, at most 2048). `stats`: a folder in which the measured statistics are kept for further
    calls with the same model and text. `plan`: a plan file to carry out in place of the method's own. `refit`: fit
    coefficients again to what the compressed layers before really give (`"auto"`: if the method does so). `effort`:
    train nothing afterwards (`"closed"`), each block towards the original's (`"blocks"`), or after that the whole model
    towards what the original predicts (`"distill"`); `refine` sets the former's `epochs`, `lr`, `batch_size`, `norms`,
    `distill` the latter's `tokens`, `lr`, `batch_size`. `folder`: where to leave the finished checkpoint (and continue
    an interrupted run), by default a temporary one. `progress`: show it (`None`: in a terminal). `options` are the
    method's own, such as `group_size=4`. The result is what `from_pretrained` gives for the folder: it saves with
    `save_pretrained` and trains like any model.

    Raises `LayershareError` for what cannot be done, before anything is computed.
    """
    text = as_source(text)
    require_model(model)
    recipe = make_recipe(
        {
            "model": _name_of(model),
            "method": method,
            "options": options,
            "keep": keep,
            "of": of,
            "plan": None if plan is None else str(plan),
            "refit": refit,
            "calibration": {
                "text": name_of(text),
                "blocks": blocks,
                "length": length,
                "seed": seed,
                "batch_size": batch_size,
                "stats": None if stats is None else str(stats),
            },
            "effort": effort,
            "refine": refine,
            "distill": distill,
        }
    )
    with TemporaryDirectory(prefix="layershare-") as temporary, shown(progress) as (announce, _):
        out = Path(temporary) / "model" if folder is None else Path(folder)
        run(recipe, out, model=model, tokenizer=tokenizer, text=text, announce=announce, pages=folder is not None)
        return load(out, dtype=model.dtype, device_map=model.device).train(model.training)


def heal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    teacher: PreTrainedModel | str | Path | None = None,
    train: str = Healing.train,
    loss: str = Loss.kind,
    text: Source = TrainingText.text,
    length: int | None = None,
    tokens: int | None = None,
    epochs: float | None = None,
    lr: float = Optimizer.lr,
    batch_size: int = Healing.batch_size,
    folder: str | Path | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """A compressed model, trained so that it wins back what it lost; the given ones are not changed.

    `teacher`: the original, in memory or by name (`None`: as the model says that it was made from). `train`: `lora`,
    `factors`, `norms`, `full` or `deltas`; `loss`: `ce`, `distill` or `both`. `text`: what to train on, as `load_text`
    takes it, in blocks of `length` tokens, `batch_size` of them per step, for so many `tokens` or `epochs` (one).
    `folder`: where to leave the finished checkpoint (and continue an interrupted healing), by default a temporary one.
    `progress`: show it, with loss and perplexity (`None`: in a terminal). `settings`: whatever else `Healing` has, such
    as `replace={}`, `compile=True` or `lora={"rank": 16}`, also by its full key: `**{"loss.temperature": 2.0}`.

    Raises `LayershareError` for what cannot be done, before anything is computed, when the loss is no number, and in
    several processes, which the command line has.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LayershareError("Several processes train a model in a folder: save it, and call `layershare heal`.")
    text = as_source(text)
    require_model(model)
    if teacher is not None and not isinstance(teacher, str | Path):
        require_model(teacher, what="teacher")
    given = {key: settings.pop(key) for key in [*settings] if "." in key}
    given |= {
        "model": _name_of(model),
        "teacher": str(teacher) if isinstance(teacher, str | Path) else None,
        "train": train,
        "loss.kind": loss,
        "text.text": name_of(text),
        "text.length": length,
        "text.tokens": tokens,
        "text.epochs": epochs,
        "optimizer.lr": lr,
        "batch_size": batch_size,
    }
    # Evaluating, exporting and the like start sooner without the Trainer.
    from layershare.healing.heal import heal_folder
    from layershare.healing.job import prepare_healing

    healing = make_healing(copy.deepcopy(settings), {key: value for key, value in given.items() if value is not None})
    with TemporaryDirectory(prefix="layershare-") as temporary, shown(progress) as (announce, say):
        for module in model.modules():
            if isinstance(module, ComposedLinear):
                module.require_plain_parts()
        source, out = Path(temporary) / "compressed", Path(temporary) / "model" if folder is None else Path(folder)
        model.save_pretrained(source)
        (tokenizer or tokenizer_of(model)).save_pretrained(source)
        name = source_of(model)
        if name is not None and (files := files_of(name)) is not None:
            copy_side_files(files, source, vocabulary=tokenizer is None)
        master = teacher if isinstance(teacher, PreTrainedModel) else None
        heal_folder(prepare_healing(healing, folder=source, teacher=master, text=text), out, announce=announce, say=say)
        return load(out, dtype=model.dtype, device_map=model.device).train(model.training)


def quantize(
    folder: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group: int | None = None,
    basis_bits: int | None = None,
    scheme: Scheme = "int",
    text: Source | None = None,
    blocks: int = Calibration.blocks,
    length: int | None = None,
    seed: int = Calibration.seed,
    batch_size: int = Calibration.batch_size,
    device: str = Recipe.device,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> PreTrainedModel:
    """The model of a folder or hub id, compressed or not, with the matrices of its blocks in numbers of few bits.

    It is left in the new folder `out` and returned as `from_pretrained` gives it. `bits`: 8, 6, 5, 4, 3 or 2 for each
    number, `basis_bits` for those of bases (`None`: the same), with a scale for each `group` along the input (`None`:
    64). `scheme`: integers, or floats of 4 bits, `nvfp4` in groups of 16 or `mxfp4` of 32. `text`: what GPTQ
    compensates errors for, as `load_text` takes it, in `blocks` blocks of `length` tokens (`None`: the model's context,
    at most 2048); `None` rounds. `progress`: show it (`None`: in a terminal).

    Raises `LayershareError` for what cannot be done, before anything is written.
    """
    from layershare.quantizing import quantize_folder

    calibration = source = None
    if text is not None:
        source = as_source(text)
        values = {"text": name_of(source), "blocks": blocks, "length": length, "seed": seed, "batch_size": batch_size}
        calibration = make_as(Calibration, values)
    with shown(progress) as (announce, _):
        quantize_folder(
            folder,
            out,
            bits=bits,
            group=group,
            basis_bits=basis_bits,
            scheme=scheme,
            calibration=calibration,
            text=source,
            device=device,
            trust_remote_code=trust_remote_code,
            announce=announce,
        )
        return load(out, device_map=device_of(device), trust_remote_code=trust_remote_code)


def make_plan(
    model: PreTrainedModel | PreTrainedConfig,
    *,
    method: str = Recipe.method,
    keep: float | str = Recipe.keep,
    of: str = Recipe.of,
    **options: Any,
) -> Plan:
    """What `compress` would do, from the config alone or from the weights: groups, ranks and exact sizes.

    Raises `LayershareError` as `compress` does, and for methods that plan by what they measure on a text.
    """
    spec, chosen = describe(model), make_method(method, options)
    evidence = Evidence(spec)
    if isinstance(model, PreTrainedModel) and not (chosen.uses or chosen.searches):
        in_memory = not any(parameter.is_meta for parameter in model.parameters())
        evidence = Evidence(spec, Weights.of(model)) if in_memory else evidence
    return plan_with(spec, method, chosen, keep, of, evidence)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: Source = "wikitext2",
    original: PreTrainedModel | None = None,
    blocks: int | None = None,
    length: int | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Evaluation:
    """Perplexity on the text's held-out part and, given the original, its perplexity, KL divergence, top-1 agreement.

    `blocks` of the text (`None`: all), of `length` tokens (`None`: the model's context, at most 2048). `progress`: show
    it (`None`: in a terminal). Raises `LayershareError` for texts that cannot be read or used with the model, and for
    models of different vocabularies.
    """
    require_runnable(model)
    text = as_source(text)
    values = {"text": name_of(text), "blocks": blocks, "length": length, "batch_size": batch_size}
    options = make_as(EvaluationSettings, values)
    if original is not None:
        require_runnable(original, what="original")
        require_same_vocabulary("original", original, model.config)
    tokens = load_text(
        text,
        tokenizer,
        split="test",
        blocks=options.blocks,
        length=block_length(model.config, options.length),
        vocabulary=model.config.get_text_config().vocab_size,
    )
    with shown(progress) as (announce, _):
        return evaluate(model, tokens, original, batch_size=options.batch_size, progress=announce("evaluate"))


def evaluate_folder(folder: str, original: str | None, recipe: Recipe, announce: Announce = silent) -> Evaluated:
    """Measure the model in a folder as the recipe's evaluation says; returns what `eval` writes.

    Raises `LayershareError` as `measure`, and if there is no model.
    """
    assert recipe.evaluation is not None
    options, device = recipe.evaluation, device_of(recipe.device)
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    config, tokenizer = read_config(folder, **trust), read_tokenizer(folder, **trust)
    if original is not None:
        require_same_vocabulary("original", original, config, tokenizer, **trust)
    evaluator = load_evaluator(options, tokenizer, config)
    dtype = dtype_of(options.dtype, device, config)
    model = load(folder, dtype=dtype, device_map=device, **trust)
    reference = None if original is None else load(original, dtype=model.dtype, device_map=device, **trust)
    measured = evaluator.measure(model, reference, announce("evaluate"))
    place = vars(Environment.here(*evaluator.packages))
    return Evaluated(model=folder, original=original, evaluation=measured, **place)


def bench_folder(
    folder: str,
    original: str | None,
    recipe: Recipe,
    workload: Workload,
    engine: str = "transformers",
    announce: Announce = silent,
) -> Speed:
    """Measure the speed of the model in a folder with the recipe's dtype and device; returns what `bench` writes.

    `engine`: one of `ENGINES`; vllm chooses the device itself. Raises `LayershareError` if there is no model, the
    texts do not fit into one's context, or the engine is missing or refuses one.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if engine == "vllm" and recipe.device != "auto":
        raise LayershareError("vLLM runs on the device that it was built for; leave --device out.")
    package = vllm_package() if engine == "vllm" else engine
    trust: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    names = [folder] if original is None else [folder, original]
    configs = [read_config(name, **trust) for name in names]
    if original is not None:
        require_same_vocabulary("original", original, configs[0], **trust)
    for config in configs:
        require_context(config, workload.prompt, workload.new)
    engines, models = [], []
    with ExitStack() as running:
        if engine == "vllm":
            room = {"rows": max(workload.batches), "length": workload.prompt + workload.new}
            announce("start")
            start = partial(vllm_engine, **room, **trust)
            for name in names:
                dtype = engines[0].dtype if engines else recipe.dtype
                engines.append(running.enter_context(start(resolve(name), dtype=dtype)))
            timers, dtype, device = [each.seconds for each in engines], engines[0].dtype, engines[0].device
        else:
            device = device_of(recipe.device)
            for name in names:
                dtype = models[0].dtype if models else recipe.dtype
                models.append(load(name, dtype=dtype, device_map=device, **trust))
            timers = [partial(generate_seconds, model) for model in models]
            dtype = str(models[0].dtype).removeprefix("torch.")
        vocabulary = min(config.get_text_config().vocab_size for config in configs)
        rates = measure_speed(timers, workload, vocabulary, announce("bench"))
        memory = [each.memory() for each in engines] if engines else [weight_bytes(model) for model in models]
    return Speed(
        model=folder,
        original=original,
        engine=f"{package} {version(package)}",
        dtype=dtype,
        device=device,
        **vars(workload),
        rates=rates,
        memory=memory[0],
        original_memory=None if original is None else memory[1],
        **vars(Environment.here()),
    )


def _name_of(model: PreTrainedModel) -> str:
    """What stands for a model in a recipe: where it comes from, or its type if that is a folder that has gone."""
    name = source_of(model) or model.name_or_path or ""
    gone = Path(name).is_absolute() and not Path(name).exists()
    return model.config.model_type if gone or not name else name
