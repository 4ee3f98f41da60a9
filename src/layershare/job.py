"""What is checked and planned before a run: everything that can be known before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layershare.calibrate.stats import Statistic, Stats
from layershare.calibrate.text import Source, Text, block_length, load_text
from layershare.device import device_of, dtype_of, training_device
from layershare.errors import LayershareError
from layershare.folders import require_folder
from layershare.methods import make_method, plan_with
from layershare.model.arch import Spec
from layershare.model.checked import main_dtype, stored_tensors
from layershare.model.checkpoint import Tensors
from layershare.model.composition import Storage
from layershare.model.describe import describe
from layershare.model.source import read_config, require_same_model, resolve, values_of
from layershare.model.weights import Weights
from layershare.plan.budget import allowed, parse_keep
from layershare.plan.edits import Delta, Place, Quantize, Share, quantized, sharing, sliced_width
from layershare.plan.evidence import Evidence
from layershare.plan.method import Method
from layershare.plan.needs import Needs, estimate_needs
from layershare.plan.plan import Plan
from layershare.plan.work import Speed, measure_speed
from layershare.progress import Announce, silent
from layershare.recipe import Calibration, Recipe
from layershare.solve.refine import require_factors


@dataclass(frozen=True)
class Job:
    """A recipe checked against its model: everything that can be known before a weight is read.

    `spec` has the types in which the result is stored, `computed` those in which the model is run. `plan` is `None`
    for a method that plans by what it measures.
    """

    recipe: Recipe
    spec: Spec
    computed: Tensors
    method: Method
    name: str
    plan: Plan | None
    config: PreTrainedConfig

    @property
    def stored(self) -> tuple[Quantize, ...]:
        """How all matrices are stored, if the recipe says so."""
        return _stored(self.recipe, self.spec)

    @property
    def length(self) -> int:
        """Tokens per block of the calibration text."""
        return block_length(self.config, self.recipe.calibration.length)

    @property
    def refits(self) -> bool:
        """Whether coefficients will be fitted again to what the compressed layers put out."""
        if self.plan is None:
            kept = allowed(self.spec, parse_keep(self.recipe.keep), self.recipe.of, self.stored).fraction
            return self.method.refits(float(kept)) if self.recipe.refit == "auto" else self.recipe.refit
        return refits(self.plan, self.method, self.recipe.refit)

    @property
    def compares(self) -> bool:
        """Whether the method's plan is compared with others on held-out text.

        One of bits is not where the recipe insists on a refit or on training, which bits alone leave nothing for.
        """
        insists = self.recipe.refit is True or self.recipe.effort != "closed"
        return self.plan is None and bool(self.method.rivals()) and not (self.method.offered_bits and insists)

    @property
    def holds_out(self) -> bool:
        """Whether the run needs blocks of text on which choices are tried."""
        return self.compares or self.recipe.refine is not None or (self.method.follows_original and self.refits)

    @property
    def kinds(self) -> frozenset[Statistic]:
        """The statistics that the run needs: to plan by, or to solve groups with."""
        solves = self.plan is None or bool(sharing(self.plan.edits))
        return self.method.uses if solves else frozenset()

    @property
    def calibrated(self) -> bool:
        """Whether the run needs a text."""
        if self.recipe.refine is not None:
            return True
        if self.plan is None:
            return bool(self.kinds) or self.method.searches or self.refits or bool(self.stored)
        whole = sliced_width(self.plan.edits) is not None or bool(quantized(self.plan.edits))
        return bool(self.kinds) or self.refits or whole

    @property
    def needs(self) -> Needs:
        """What the run will need of the machine."""
        options = self.recipe.calibration
        return estimate_needs(
            replace(self.spec, tensors=self.computed),
            self.plan,
            blocks=options.blocks,
            length=self.length,
            batch_size=options.batch_size,
            kinds=self.kinds,
            streams=self.refits * (2 if self.method.follows_original else 1),
            epochs=0 if self.recipe.refine is None else self.recipe.refine.epochs,
            distills=0 if self.recipe.distill is None else self.recipe.distill.tokens,
            searches=self.plan is None and self.method.searches,
            runs=self.method.runs(self.spec) if self.plan is None else 0,
            held_out=options.held_out if self.holds_out else 0,
            rivals=len(self.method.rivals()) if self.compares else 0,
            quantizes=bool(self.method.offered_bits or self.stored or (self.plan and quantized(self.plan.edits))),
            bits=len(self.method.offered_bits),
        )


def speed_for(job: Job) -> Speed:
    """The speed of the job's device at products of its model's size, measured."""
    linear = max(job.spec.linears, key=lambda linear: linear.parameters)
    _, dtype = job.computed[job.spec.weight_name(linear)]
    return measure_speed(device_of(job.recipe.device), dtype, min(linear.d_in, linear.d_out))


def refits(plan: Plan, method: Method, wanted: Literal["auto"] | bool) -> bool:
    """Whether the coefficients of a plan's shares are fitted again; `auto`: as the method says."""
    kept = plan.after.targets.parameters / plan.before.targets.parameters
    chosen = method.refits(kept) if wanted == "auto" else wanted
    return chosen and any(isinstance(edit, Share) for edit in plan.edits)


def prepare(recipe: Recipe, model: PreTrainedModel | PreTrainedConfig | Weights | None = None) -> Job:
    """Check a recipe and, where the method can, plan it, without reading a weight.

    The model is read by name if none is given: its config, and which types its weights have if they are here. A plan
    file is carried out with the method and the options that it names. Raises `LayershareError` for everything that is
    wrong with the recipe.
    """
    method = make_method(recipe.method, recipe.options)
    source, checkpoint = _described(recipe, model)
    config = source.config if isinstance(source, PreTrainedModel) else source
    dtype = dtype_of(recipe.dtype, device_of(recipe.device), config)
    spec = describe(source, None if dtype == "auto" else getattr(torch, dtype))
    if checkpoint:
        require_same_model(recipe.model, spec, checkpoint)
    computed = spec.tensors
    if recipe.store_dtype != "auto":
        spec = spec.stored_as({}, getattr(torch, recipe.store_dtype))
    elif checkpoint:
        spec = spec.stored_as({name: each.dtype for name, each in checkpoint.items()}, main_dtype(checkpoint))
    elif isinstance(source, PreTrainedConfig) and isinstance(source.dtype, torch.dtype):
        spec = spec.stored_as({}, source.dtype)
    name, plan, stored = recipe.method, None, _stored(recipe, spec)
    if stored:
        _require_storable(recipe, method)
    if recipe.plan is not None:
        if recipe.options:
            raise LayershareError("A plan is carried out with the options that it names; give no others beside it.")
        plan = Plan.read(recipe.plan, spec)
        if not plan.edits:
            raise LayershareError(f"The plan '{recipe.plan}' has no edits: there is nothing to carry out.")
        _require_agreement(recipe, plan)
        name, method = plan.method, make_method(plan.method, plan.options)
    elif not method.adaptive:
        plan = plan_with(spec, name, method, recipe.keep, recipe.of, stored=stored)
    else:
        method.require(spec, allowed(spec, parse_keep(recipe.keep), recipe.of, stored))
    if recipe.refine is not None:
        _require_trainable(recipe, method, plan)
    if plan is not None:
        method.units(spec, plan.edits)
        if recipe.refit is True and not any(isinstance(edit, Share) for edit in plan.edits):
            raise LayershareError("The plan has no low-rank factors that could be fitted again; leave refit out.")
    return Job(recipe, spec, computed, method, name, plan, config)


def _require_agreement(recipe: Recipe, plan: Plan) -> None:
    """Raise `LayershareError` for what a recipe says otherwise than its plan: it would have no effect."""
    for name in ("method", "keep", "of"):
        said, planned = getattr(recipe, name), getattr(plan, name)
        if said not in (planned, getattr(Recipe, name)):
            raise LayershareError(f"The plan '{recipe.plan}' is made with {name}={planned}; leave {name}={said} out.")


def _require_trainable(recipe: Recipe, method: Method, plan: Plan | None) -> None:
    """Raise `LayershareError` for an effort where no factors are, or where some or all of them could not train."""
    if method.starts_at_zero:
        raise LayershareError(
            "Steps are relative to each tensor's size, and with init=random all deltas are zero: set effort=closed and "
            "train with `layershare heal`, or init=svd."
        )
    if recipe.distill is not None:
        training_device(recipe.device)
    if plan is not None:
        require_factors(plan.edits)
        if recipe.distill is not None and {Share, Delta} <= {type(edit) for edit in plan.edits}:
            raise LayershareError(
                "The plan has deltas beside shared factors, which are not distilled together; set effort=blocks."
            )
    elif not _makes_factors(method):
        raise LayershareError(f"'{recipe.method}' makes no factors that could be trained; set effort=closed.")


def _makes_factors(method: Method) -> bool:
    return not {Share, Delta}.isdisjoint(method.solves)


def _stored(recipe: Recipe, spec: Spec) -> tuple[Quantize, ...]:
    """How a recipe stores all matrices of the blocks, if it says so. Raises `LayershareError` as `Storage`."""
    how = recipe.quantize
    if how is None:
        return ()
    everywhere = tuple(Place(linear.role, linear.layer) for linear in spec.linears)
    storage, shared = Storage.pair(how.bits, how.basis_bits, how.group, how.scheme)
    return (Quantize(everywhere, storage.bits, shared.bits, storage.group, storage.scheme),)


def _require_storable(recipe: Recipe, method: Method) -> None:
    """Raise `LayershareError` for what says itself how it is stored, and for what must be quantized afterwards."""
    if recipe.plan is not None:
        raise LayershareError("A plan says itself what is quantized; leave quantize out, or add edits to the plan.")
    if method.offered_bits:
        raise LayershareError("Bits are planned already (options.bits); leave quantize out.")
    if not _makes_factors(method):
        raise LayershareError(
            f"'{recipe.method}' removes parts of the model; compress first, and quantize the result with `layershare "
            "quantize`."
        )


def _described(
    recipe: Recipe, model: PreTrainedModel | PreTrainedConfig | Weights | None
) -> tuple[PreTrainedModel | PreTrainedConfig, Mapping[str, Tensor] | None]:
    """The model or config that a recipe is about, and what its checkpoint stores, as far as that is here."""
    if isinstance(model, Weights):
        return model.model, model.checkpoint
    if model is not None:
        return model, None
    config = read_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    source = resolve(recipe.model)
    return config, stored_tensors(source, values_of(source), fetch=False)


def missing_to_plan(job: Job, folder: Path | None) -> str | None:
    """Why a job has no plan before it is carried out, given a folder of statistics or none; `None` if it has one."""
    if job.plan is not None:
        return None
    if job.method.searches:
        return f"'{job.name}' runs the model on a text while it plans: `layershare compress` shows its plan at the end."
    if job.method.uses and folder is None:
        return f"'{job.name}' plans by what it measures: give statistics from `layershare calibrate` with --stats."
    return None


def planned(job: Job, folder: Path | None, announce: Announce = silent) -> Job:
    """A job with its plan, by what its method needs: weights, or statistics that `calibrate_to` left in a folder.

    Raises `LayershareError` if the method needs statistics that are not there, or a text.
    """
    recipe = job.recipe
    if job.plan is not None:
        return job
    if (missing := missing_to_plan(job, folder)) is not None:
        raise LayershareError(missing)
    if folder is not None:
        require_folder(folder)
    with TemporaryDirectory(prefix="layershare-") as scratch:
        weights = open_weights(recipe, job.config, Path(scratch))
        stats = None
        if folder is not None and job.method.uses:
            stats = Stats.find(folder, weights.fingerprint)
            stats.require(job.method.uses, job.spec.n_layers)
        evidence = Evidence(job.spec, weights, stats, progress=announce("plan"))
        plan = plan_with(job.spec, job.name, job.method, recipe.keep, recipe.of, evidence, job.stored)
        return replace(job, plan=plan)


def load_calibration(
    options: Calibration, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, text: Source | None = None
) -> Text:
    """All of a calibration text, or of `text` in its place, for a model of that config. Raises as `load_text`."""
    return _load(options, tokenizer, config, text, 0)


def load_with_spare(
    options: Calibration, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, text: Source | None = None
) -> tuple[Text, Text | None]:
    """The calibration text, and the blocks beside it that are held out: of a short text an eighth, of one block none.

    Every method calibrates on the same blocks, whether it tries choices or not, so that all share statistics. Raises as
    `load_text`.
    """
    whole = _load(options, tokenizer, config, text, options.held_out)
    count = len(whole.tokens)
    if count < 2:
        return whole, None
    return whole.split(count - max(count - options.blocks, min(options.held_out, max(1, count // 8))))


def load_and_hold_out(
    options: Calibration, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, text: Source | None = None
) -> tuple[Text, Text]:
    """The same. Raises `LayershareError`, too, if there is no more than one block."""
    calibration, held_out = load_with_spare(options, tokenizer, config, text)
    if held_out is None:
        raise LayershareError(
            f"The text '{calibration.source}' is one block of {calibration.tokens.shape[1]} tokens, and choices are "
            "tried on another one; give a longer text or a smaller length."
        )
    return calibration, held_out


def _load(
    options: Calibration, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, text: Source | None, spare: int
) -> Text:
    return load_text(
        options.text if text is None else text,
        tokenizer,
        split="train",
        blocks=options.blocks,
        length=block_length(config, options.length),
        spare=spare,
        seed=options.seed,
        vocabulary=config.get_text_config().vocab_size,
    )


def open_weights(recipe: Recipe, config: PreTrainedConfig, scratch: Path) -> Weights:
    """The weights of a recipe's model, which is of that config, left on disk."""
    device = device_of(recipe.device)
    place: dict[str, Any] = {"device": device, "trust_remote_code": recipe.trust_remote_code}
    return Weights.open(recipe.model, scratch, dtype=dtype_of(recipe.dtype, device, config), **place)
