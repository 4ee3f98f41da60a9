"""How long a run takes: what is counted, and that the machine's speed makes seconds of it."""

import pytest
import torch

from layershare.model.describe import describe
from layershare.plan.work import START, Speed, Work, count_work, measure_speed
from tests.families import tiny_model

SPEC = describe(tiny_model("llama"))
NOTHING = {"blocks": 2, "length": 8, "kinds": frozenset(), "streams": 0, "epochs": 0, "runs": 0}


def work(**changes) -> Work:
    return count_work(SPEC, None, **{**NOTHING, **changes})


def test_a_pass_of_the_text_goes_once_through_every_matrix_and_makes_a_gram_at_every_site():
    matrices = sum(linear.parameters for linear in SPEC.linears)
    scores = 2 * 8 * sum(linear.d_in for linear in SPEC.linears if linear.role == "o")
    measured = work(kinds=frozenset({"inputs"}))
    assert measured.model == 2 * 8 * (matrices + scores)
    assert measured.single == 2 * 8 * 4 * (3 * 32**2 + 56**2)
    assert measured.eigen == sum(min(linear.d_in, linear.d_out) ** 3 for linear in SPEC.linears)
    assert work(kinds=frozenset({"inputs"}), streams=1).model == 3 * measured.model
    assert work(kinds=frozenset({"inputs"}), epochs=10).model == 33 * measured.model
    assert work(kinds=frozenset({"inputs"}), blocks=20).model == 10 * measured.model
    head = 2 * 8 * SPEC.head_multiplications
    compared = 3 * (measured.model + 2 * head)  # the plan, a refit and what is refined
    assert work(epochs=10, held_out=2).model == work(epochs=10).model + 13 * measured.model + compared
    assert work(kinds=frozenset({"fisher"})).model == 3 * (measured.model + head)
    assert work(runs=6).model == 3 * (measured.model + head)


def test_rivals_are_solved_and_measured_on_held_out_text():
    alone = work(kinds=frozenset({"inputs"}))
    compared = work(kinds=frozenset({"inputs"}), rivals=2, held_out=1)
    assert (compared.eigen, compared.double) == (3 * alone.eigen, 3 * alone.double)
    passed = alone.model // 2 + 2 * 8 * SPEC.head_multiplications  # one block of text, and the head twice
    assert compared.model - alone.model == 4 * passed


def test_methods_that_leave_out_or_merge_layers_solve_nothing():
    assert work(kinds=frozenset({"blocks"})).eigen == work(runs=6).eigen == 0
    assert work().eigen > 0


def test_integers_are_rounded_column_by_column():
    kinds = frozenset({"inputs", "gradients"})
    plain = work(kinds=kinds)
    planned = work(kinds=kinds, quantizes=True, bits=5)
    widths = sum(linear.d_in for linear in SPEC.linears)
    # Each matrix at 5 numbers of bits, its factors at three ranks, and what is taken in the end.
    assert (plain.columns, planned.columns) == (0, (5 + 3 + 1) * widths)
    assert planned.double > plain.double
    once = work(kinds=kinds, quantizes=True)
    assert once.columns == (3 + 1) * widths


def test_speed_makes_seconds_of_it():
    speed = measure_speed("cpu", torch.bfloat16, 32)
    assert min(speed.model, speed.single, speed.double, speed.eigen, speed.column) > 0
    assert speed.place == "cpu, 1 thread"
    assert Work().seconds(speed) == START
    done = Work(single=6, double=4, eigen=3, columns=7)
    assert done.seconds(Speed(1, 2, 2, 1, "", 0.5)) == pytest.approx(START + 3 + 2 + 3 + 3.5)
