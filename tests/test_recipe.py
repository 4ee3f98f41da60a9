import pytest

from layershare.errors import LayershareError
from layershare.recipe import Recipe, parse_recipe, read_recipe


def test_a_recipe_survives_yaml():
    recipe = parse_recipe("model: sample\nkeep: 0.7\nevaluation: {text: stdlib, blocks: 4}\noptions: {group_size: 3}")
    assert recipe.evaluation is not None
    assert (recipe.keep, recipe.evaluation.blocks, recipe.calibration.blocks) == (0.7, 4, 256)
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_changes_apply_to_sections_and_make_them():
    changes = ("calibration.blocks=32", "evaluation.text=c4", "options.group_size=4", "keep=11GB")
    recipe = parse_recipe("model: sample", changes)
    assert recipe.calibration.blocks == 32
    assert recipe.evaluation is not None
    assert recipe.evaluation.text == "c4"
    assert (recipe.options, recipe.keep) == ({"group_size": 4}, "11GB")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "Unknown key 'modle'. Did you mean 'model'"),
        ("model: x\ncalibration: {block: 3}", "Unknown key in calibration 'block'. Did you mean 'blocks'"),
        ("keep: 0.5", "lacks the key 'model'"),
        ("model: x\ncalibration: {blocks: many}", "'calibration.blocks' in the recipe"),
        ("model: x\ncalibration: {blocks: 0}", "'calibration.blocks' in the recipe"),
        ("model: x\nof: half", "'of' in the recipe"),
        ("- a list", "must be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(LayershareError, match=message):
        parse_recipe(text)


def test_changes_that_cannot_be_applied():
    with pytest.raises(LayershareError, match="'keep' is not a setting"):
        parse_recipe("model: x", ("keep",))
    with pytest.raises(LayershareError, match="'model' is a value"):
        parse_recipe("model: x", ("model.name=3",))
    with pytest.raises(LayershareError, match=r"there is no 'no-such\.yaml'"):
        read_recipe("no-such.yaml")


def test_defaults_are_the_papers():
    recipe = Recipe("m")
    assert (recipe.method, recipe.calibration.text, recipe.calibration.blocks) == ("basis-sharing", "wikitext2", 256)
    assert recipe.calibration.seed == 2023
