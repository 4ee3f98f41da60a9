"""What settings may hold: every field of recipes, healings and methods' options refuses what means nothing."""

import math
from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from layershare.errors import LayershareError
from layershare.healing.settings import Healing, Lora, Loss, Optimizer, Replacement, Search, TrainingText
from layershare.methods import METHODS, make_method
from layershare.plan.budget import parse_keep
from layershare.recipe import Calibration, EvaluationSettings, Recipe, Refine, make_as
from layershare.values import adapter, checked

SETTINGS = (
    Recipe,
    Calibration,
    EvaluationSettings,
    Refine,
    Healing,
    Lora,
    Loss,
    Replacement,
    TrainingText,
    Optimizer,
    Search,
)
KINDS = (*SETTINGS, *METHODS.values())
NO_NUMBER = (True, "4", "many", [4], {}, math.nan, math.inf, -math.inf, 10**400, 1e308, -1e308, -(10**30))
WRONG: dict[str, tuple[Any, ...]] = {
    "integer": (*NO_NUMBER, 4.0, 10**30),
    "number": NO_NUMBER,
    "boolean": (1, 0, 1.0, "maybe", [], math.nan),
    "string": (True, 4, 0.5, b"word", [], {}),
    "array": (True, 4, {}, [4], [[]], ["a", True]),
    "object": (True, 4, "word", [], {1: 2}),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_means_and_refuses_values_of_other_kinds(kind):
    described = adapter(kind).json_schema().get("properties", {})
    assert set(described) == {field.name for field in fields(kind)}
    for name, schema in described.items():
        if "$ref" in str(schema):  # a section
            continue
        assert schema["description"].strip()
        types = {each["type"] for each in schema.get("anyOf", [schema])} - {"null"}
        first, *others = ({repr(value): value for value in WRONG[each]} for each in types)
        wrong = [value for shown, value in first.items() if all(shown in other for other in others)]
        if schema.get("items") == {"type": "integer"}:  # a number, too, stands for a list of it
            wrong = [value for value in wrong if value not in (4, [4])]
        assert wrong
        for value in wrong:
            with pytest.raises(ValidationError) as error:
                checked(kind, {name: value})
            assert any(each["loc"][:1] == (name,) for each in error.value.errors()), (name, value)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (Recipe, {"max_shard_size": "0GB"}, "at least 1KB"),
        (Recipe, {"max_shard_size": "0.0001KB"}, "at least 1KB"),
        (Recipe, {"max_shard_size": "many"}, "at least 1KB"),
        (Recipe, {"refine": {"lr": math.inf}}, "'refine.lr' in the recipe: Input should be a finite number"),
        (Recipe, {"refine": {"lr": 1e38}}, r"Input should be at most 1e\+30"),
        (Recipe, {"refine": True}, "should be a mapping of keys to values"),
        (
            Recipe,
            {"refine": {}},
            r"has 'refine', but its effort is 'closed'; leave it out \(refine=null\), or set effort=blocks",
        ),
        (
            Recipe,
            {"effort": "blocks", "distill": {}},
            r"'distill', but its effort is 'blocks'; leave it out \(distill=null\), or set effort=distill",
        ),
        (Recipe, {"effort": "much"}, "'effort' in the recipe: Input should be 'closed', 'blocks' or 'distill'"),
        (Recipe, {"calibration": {"seed": True}}, "'calibration.seed' in the recipe: Input should be a whole number"),
        (Recipe, {"calibration": {"blocks": 10**12}}, "at most 1,000,000,000"),
        (Recipe, {"keep": True}, r"a fraction \(0.8\)"),
        (Recipe, {"options": {1: 2}}, "'options"),
        (Recipe, {"evaluation": {"tasks": 3}}, "a list of names"),
        (Healing, {"lora": {"targets": "coefficient"}}, "'linears' or a list of names"),
        (Healing, {"loss": {"temperature": 1e-320}}, "'loss.temperature' in the recipe: Input should be at least 0.01"),
        (Healing, {"optimizer": {"beta1": 1}}, "below 1"),
        (Healing, {"optimizer": {"arguments": "foo"}}, "written as key=value"),
        (Healing, {"text": {"epochs": math.inf}}, "a finite number"),
        (Healing, {"text": {"epochs": 1e300}}, "at most 10000"),
    ],
)
def test_what_means_nothing_is_told(kind, values, said):
    with pytest.raises(LayershareError, match=said):
        make_as(kind, {"model": "m", **values})


def test_what_people_write_is_understood():
    recipe = make_as(
        Recipe,
        {
            "model": "\udcff.txt",
            "evaluation": {"tasks": "piqa,arc_easy"},
            "effort": "blocks",
            "refine": {"norms": "yes"},
        },
    )
    assert recipe.model == "\udcff.txt"
    assert recipe.evaluation is not None
    assert recipe.evaluation.tasks == ("piqa", "arc_easy")
    assert recipe.refine is not None
    assert recipe.refine.norms is True
    assert make_as(Healing, {"model": "m", "optimizer": {"lr": 1}}).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("method", "option", "said"),
    [
        ("basis-sharing", {"group_size": True}, "Option 'group_size' of basis-sharing: Input should be a whole number"),
        ("basis-sharing", {"group_size": 2.0}, "whole number"),
        ("basis-sharing", {"shared": [1]}, "'shared.0' of basis-sharing"),
        ("basis-sharing", {"joint": 1}, "true or false"),
        ("laco", {"threshold": -math.inf}, "a finite number"),
        ("asvd", {"ratios": 10**12}, "at most 1,000"),
        ("bolaco", {"seed": True}, "whole number"),
    ],
)
def test_options_of_methods(method, option, said):
    with pytest.raises(LayershareError, match=said):
        make_method(method, option)


@pytest.mark.parametrize(
    "keep", ["nan", "-1", "0x1", "1e", "9" * 5000, "1e99999", "0.8.1", "5e4 B B", "٠.٨", "", "inf"]
)
def test_dials_that_are_not_understood(keep):
    with pytest.raises(LayershareError, match="is not understood"):
        parse_keep(keep)


def test_dials_with_exponents():
    assert parse_keep("1e-9").fraction == parse_keep(1e-9).fraction
    assert parse_keep("5e3B").parameters == 5 * 10**12
    assert parse_keep("5e400B").parameters == 5 * 10**409
