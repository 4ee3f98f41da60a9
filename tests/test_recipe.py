import os
from pathlib import Path

import pytest
import yaml

from layershare.errors import LayershareError
from layershare.recipe import Recipe, make_recipe, parse_recipe, read_recipe


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: " + b"[" * 20_000, "nested more than 64 levels deep"),
        (b"{a: " * 3000, "nested more than 64 levels deep"),
        (b"model: x\nkeep: " + b"1" * 5000, "Exceeds the limit"),
        (b"model: x\nkeep: 0.8\nkeep: 0.5", "the key 'keep' is given twice in line 3"),
        (b"model: x\ncalibration: {blocks: 1, blocks: 2}", "the key 'blocks' is given twice"),
        ("model: x".encode("utf-16"), "it is not UTF-8 text"),
        (b"\x7fELF\xff\x00", "it is not UTF-8 text"),
        (b"", "must be a mapping"),
        (b"1: 2", "lacks the key 'model'"),
        (b"? [a]\n: b", "unhashable key"),
        (b"model: x\n<<: {keep: 0.5}", "Unknown key '<<'"),
        (b"model: !!binary aGVsbG8=", "'model' in the recipe"),
        (
            b"model: x\ncalibration: {blocks: 1:30}",
            "'calibration.blocks' in the recipe: Input should be a whole number",
        ),
        (b"model: x\ncalibration: {blocks: 010}", "Input should be a whole number"),
        (b"model: x\ncalibration: {blocks: 1e3}", "Input should be a whole number"),
        (b"model: x\nrefine: {lr: .inf}", "Input should be a finite number"),
        (b"model: x\nrefine: {lr: '0.1'}", "Input should be a number"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_files_that_are_no_recipes(tmp_path, content, said):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(LayershareError, match=said) as error:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("x" * 300), Path("x" * 5000)):
        with pytest.raises(LayershareError, match=r"The recipe .* cannot be used") as error:
            read_recipe(path)
        assert len(str(error.value)) < 400


def test_words_and_numbers_are_told_apart_as_people_read_them():
    recipe = parse_recipe(
        "model: on\neffort: blocks\nrefine: {lr: 1e-4, norms: yes}\ncalibration: {text: 2024-01-01, stats: 1:30}"
    )
    assert recipe.refine is not None
    assert (recipe.model, recipe.refine.lr, recipe.refine.norms) == ("on", 1e-4, True)
    assert (recipe.calibration.text, recipe.calibration.stats) == ("2024-01-01", "1:30")


@pytest.mark.parametrize("name", ["\udcff.txt", "1e-4", "on", "1:30", "010", "null", "a: b", "é\n", "0o7", "-"])
def test_odd_names_survive(name):
    recipe = make_recipe({"model": name, "calibration": {"text": name}})
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert yaml.safe_load(recipe.to_yaml())["model"] == name
    assert recipe.to_yaml().encode()


def test_changes_that_cannot_be_applied():
    with pytest.raises(LayershareError, match="'keep' is not a setting"):
        parse_recipe("model: x", ("keep",))
    with pytest.raises(LayershareError, match="'model' is a value"):
        parse_recipe("model: x", ("model.name=3",))
    with pytest.raises(LayershareError, match=r"there is no 'no-such\.yaml'"):
        read_recipe("no-such.yaml")


def test_defaults_are_the_planner_and_the_papers_text():
    recipe = Recipe("m")
    assert (recipe.method, recipe.calibration.text, recipe.calibration.blocks) == ("auto", "wikitext2", 256)
    assert recipe.calibration.seed == 2023
