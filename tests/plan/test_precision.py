"""Ranks and bits planned together: what integers lose by brute force, sizes, budgets, and that mixing pays."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from layershare.errors import LayershareError
from layershare.formulas.quantize import Numbers, as_stored
from layershare.methods import make_method, plan_with
from layershare.methods.auto import Auto
from layershare.model.composition import Storage, shared
from layershare.plan.budget import measure
from layershare.plan.edits import Place, Quantize, Share, quantized
from layershare.plan.evidence import Evidence
from layershare.plan.precision import PROBED, bytes_of_factors, offered, probed_ranks
from layershare.plan.ranks import private_groups
from layershare.plan.table import plan_table
from tests.families import tiny_model
from tests.methods.evidence import measured

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")
BITS = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory, tokenizer, words) -> Evidence:
    return measured(tiny_model("llama"), tmp_path_factory.mktemp("stats"), tokenizer, words, "inputs", "gradients")


def planned(evidence: Evidence, keep: float | str, **options: Any):
    return plan_with(evidence.spec, "auto", make_method("auto", {"bits": BITS, **options}), keep, "targets", evidence)


def raised(evidence: Evidence, place: Place, error: torch.Tensor) -> float:
    """½ tr(ΔᵀGΔΓ) / N of an error Δ, d_in × d_out."""
    linear = evidence.spec.linear(*place)
    gram, gradients = evidence.gram(linear).double(), evidence.gradient_gram(linear).double()
    return float((error.T @ gram @ error @ gradients).trace()) / 2 / evidence.stats.tokens


def test_what_matrices_lose_is_measured(evidence):
    for place in (Place("q", 1), Place("down", 2)):
        linear = evidence.spec.linear(*place)
        weight, gram = evidence.weight(linear).T, evidence.gram(linear)
        noise = Auto(bits=BITS)._noise(place, evidence)
        for bits in BITS:
            whole = as_stored(weight, gram, Numbers(bits), weight.dtype)
            expected = raised(evidence, place, (weight.double() - whole).T)
            assert noise.of_dense(bits) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side_of", ["gate", "down"])
def test_what_factors_lose_is_told_from_few_of_them(evidence, side_of):
    """At the ranks that are probed of both factors together, whatever the order; less between 0 and them; by steps."""
    place = Place(side_of, 0)
    (group,) = private_groups([evidence.spec.linear(*place)], pivot=True)
    noise = Auto(bits=BITS)._noise(place, evidence)
    ranks = torch.tensor(probed_ranks(evidence.spec.linear(*place)))
    found = noise.of_factors(PROBED, PROBED, ranks, group.side)
    assert torch.equal(found, noise.factors.sum(0))
    assert (found > 0).all()
    fewer = noise.of_factors(2, 2, ranks, group.side)
    torch.testing.assert_close(fewer / found, torch.full_like(found, (Numbers(2).step / Numbers(PROBED).step) ** 2))
    first, second = (noise.factors[i] for i in (0, 1))
    basis, rest = (first, second) if group.side == "input" else (second, first)
    finer = noise.of_factors(4, PROBED, ranks, group.side)
    torch.testing.assert_close(finer, rest + basis * (Numbers(4).step / Numbers(PROBED).step) ** 2)
    middle = noise.of_factors(PROBED, PROBED, ranks[:1] / 2, group.side)
    torch.testing.assert_close(middle, found[:1] / 2)


def test_sizes_are_those_of_the_composition(evidence):
    spec = evidence.spec
    for role in ("q", "up", "down"):
        linear = spec.linear(role, 0)
        (group,) = private_groups([linear], pivot=True)
        ranks = torch.tensor([1, 7, 16, 29])
        for basis, own in offered(BITS):
            sizes = bytes_of_factors(linear, group, Storage(basis), Storage(own), ranks, 4)
            for rank, size in zip(ranks.tolist(), sizes.tolist(), strict=True):
                edits = [group.share(rank), Quantize(group.places, own, basis)]
                dense = spec.weight_name(linear)
                others = measure(spec, ()).targets.bytes - linear.parameters * spec.tensors[dense][1].itemsize
                assert measure(spec, edits).targets.bytes == others + size
                made = shared([linear.member], rank, group.side, pivot=True)
                assert measure(spec, edits).targets.parameters - measure(spec, ()).targets.parameters == (
                    made.parameters - linear.parameters
                )


@pytest.mark.parametrize("keep", [0.15, "12KB"])
@pytest.mark.parametrize("options", [{}, {"pivot": False, "bits": 4}, {"two_sided": False, "bits": "3,8"}])
def test_plans_keep_to_their_bytes_and_use_them(evidence, keep, options):
    plan = planned(evidence, keep, **options)
    most = 12_000 if keep == "12KB" else keep * plan.before.targets.bytes
    assert 0.95 * most <= plan.after.targets.bytes <= most
    assert planned(evidence, keep, **options).edits == plan.edits
    if not options:
        assert len({(edit.basis_bits, edit.bits) for edit in plan.edits if isinstance(edit, Quantize)}) > 1


def test_planning_both_loses_less_than_either(evidence):
    """By what is predicted: less than all matrices alike at 2, 3 or 4 bits, and than ranks alone of the same bytes."""
    spec, method = evidence.spec, Auto(bits=BITS)
    places = [Place(x.role, x.layer) for x in spec.linears]
    for bits in (2, 3, 4):
        alike = (Quantize(tuple(places), bits, bits),)
        lost = method.predicted(alike, evidence)
        assert lost is not None
        both = planned(evidence, measure(spec, alike).targets.bytes / measure(spec, ()).targets.bytes)
        assert both.predicted_loss is not None
        assert both.predicted_loss <= lost
    ranks = plan_with(spec, "auto", make_method("auto"), 0.4, "targets", evidence)
    both = planned(evidence, 0.4)
    assert ranks.predicted_loss is not None
    assert both.predicted_loss is not None
    assert both.predicted_loss < ranks.predicted_loss


def test_a_prediction_counts_what_is_cut_and_what_is_rounded(evidence):
    plan = planned(evidence, 0.15)
    shares = [edit for edit in plan.edits if isinstance(edit, Share)]
    stored = quantized(plan.edits)
    assert shares
    method = Auto(bits=BITS)
    cut = method.predicted(tuple(shares), evidence)
    assert cut is not None
    assert plan.predicted_loss is not None
    of_place = {share.places[0]: share for share in shares}
    rounded = 0.0
    for place, edit in stored.items():
        noise = method._noise(place, evidence)
        if share := of_place.get(place):
            rounded += float(noise.of_factors(edit.basis_bits, edit.bits, torch.tensor(share.rank), share.side))
        else:
            rounded += noise.of_dense(edit.bits)
    assert plan.predicted_loss == pytest.approx(cut + rounded, rel=1e-9)


def test_what_is_measured_of_integers_is_kept_with_the_statistics(evidence, monkeypatch):
    """Another size or fewer bits are planned without measuring again, as by who measures; of other bits not."""
    fresh = Evidence(evidence.spec, evidence.opened, evidence.measured)
    expected = planned(evidence, 0.2)
    monkeypatch.setattr("layershare.methods.auto.dense_noise", None)
    monkeypatch.setattr("layershare.methods.auto.factors_noise", None)
    assert planned(fresh, 0.2) == expected
    assert planned(fresh, 0.2, bits=(3, 8)).edits != expected.edits
    with pytest.raises(TypeError):
        planned(fresh, 0.2, bits=(3, 5))


def test_where_nothing_can_be_kept_it_is_measured_again(evidence, monkeypatch):
    """Statistics in a folder that is only read."""
    expected = planned(evidence, 0.2)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("layershare.calibrate.stats.only_one", None)
    assert planned(Evidence(evidence.spec, evidence.opened, evidence.measured), 0.2) == expected


def test_without_ranks_whole_matrices_have_bits(evidence):
    """As many bytes as asked for at most, and more loss predicted than where ranks are chosen, too."""
    alone, both = planned(evidence, 0.25, ranks=False), planned(evidence, 0.25)
    assert {type(edit) for edit in alone.edits} == {Quantize}
    assert alone.after.targets.bytes <= 0.25 * alone.before.targets.bytes
    assert alone.predicted_loss is not None
    assert both.predicted_loss is not None
    assert alone.predicted_loss >= both.predicted_loss


def test_the_table_of_a_plan_has_a_column_of_bits(evidence):
    plan = planned(evidence, 0.15)
    edits = (Quantize((Place("q", 0), Place("q", 2)), 3, 4), Quantize((Place("q", 1),), 6, 6))
    shown = StringIO()
    Console(file=shown, width=80).print(plan_table(evidence.spec, replace(plan, edits=edits)))
    (line,) = [line for line in shown.getvalue().splitlines() if line.startswith(" q ")]
    assert line.split()[-3:] == ["4,096", "100.0%", "3–6"]


@pytest.mark.parametrize(
    ("options", "of", "message"),
    [
        ({"bits": [7]}, "targets", "Unknown number of bits '7'"),
        ({"bits": ["four"]}, "targets", "bits"),
        ({"bits": "4,"}, "targets", "a list of whole numbers"),
        ({"bits": [4], "shared": ["gate"]}, "targets", "leave joint and shared out"),
        ({"bits": [4], "joint": ["gate+up"]}, "targets", "leave joint and shared out"),
        ({"ranks": False}, "targets", "there are only bits to choose"),
        ({"bits": [4]}, "multiplications", "Fewer bits do not save multiplications"),
    ],
)
def test_what_cannot_be_planned_is_refused(evidence, options, of, message):
    with pytest.raises(LayershareError, match=message):
        plan_with(evidence.spec, "auto", make_method("auto", options), 0.3, of, evidence)
