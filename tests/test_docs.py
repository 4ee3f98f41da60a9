"""The documents do what they say."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from layershare.methods import METHODS, make_method
from layershare.recipe import read_recipe
from tests.families import CONFIGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """A working directory with the recipes."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def printed_by(command: list[str | Path], folder: Path, environment: dict[str, str]) -> str:
    """What a command prints that ends well in a folder."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_bash(commands: Path, script: str, folder: Path) -> str:
    """What a shell's script prints that runs in a folder."""
    return printed_by(["bash", "-ec", script], folder, {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"})


def run_python(commands: Path, script: str, folder: Path, **environment: str) -> str:
    """What a script prints that runs in a folder."""
    return printed_by([commands / "python", "-c", script], folder, environment)


def test_the_readme_s_commands_run_in_order(user, commands):
    printed = run_bash(commands, "\n".join(blocks("bash")), user)
    assert "The dense model is in small-dense." in printed
    assert (user / "from-recipe" / "results.json").is_file()


def test_the_commands_of_the_page_on_sharing_run(user, commands):
    page = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    (command,) = blocks("bash", page)
    assert "5 × 2 (input)" in run_bash(commands, command, user)


def test_the_readme_s_python_runs(user, commands):
    printed = run_python(commands, "\n".join(blocks("python")), user)
    assert "top-1 agreement with the original: " in printed
    assert "trainable params" in printed


def test_the_page_about_quantizing_runs(user, commands):
    page = (ROOT / "docs" / "quantizing.md").read_text(encoding="utf-8")
    folder = user / "quantizing"
    folder.mkdir()
    printed = run_bash(commands, "\n".join(blocks("bash", page)), folder)
    assert "The quantized model is in small-4bit." in printed
    assert re.search(r"^ q .*% +[36](–6)? *$", printed, re.MULTILINE)  # the bits, in the table of the plan
    run_python(commands, "\n".join(blocks("python", page)), folder)
    assert (folder / "small-8bit" / "config.json").is_file()


def test_the_pages_name_every_family_and_method():
    families = re.search(r"Tested families: (.*?)\. Mixture", README, re.DOTALL)
    assert families is not None
    assert set(re.split(r",\s+", families[1])) == set(CONFIGS)
    described = re.sub(r"<!-- .*? made by .*?<!-- end of .*?-->", "", METHODS_PAGE, flags=re.DOTALL)
    assert all(f"| `{name}` |" in described for name in METHODS)


def test_a_method_is_added_as_its_page_says(tmp_path, commands):
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    method, registering, using = blocks("python", page)
    (tmp_path / "randomized_svd.py").write_text(method, encoding="utf-8")
    before = "from tests.families import tiny_model\nmodel = tiny_model('llama')\n"
    after = "print(model.num_parameters(), small.num_parameters())\n"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    printed = run_python(commands, before + registering + using + after, tmp_path, PYTHONPATH=path)
    dense, small = map(int, printed.split()[-2:])
    assert 0.75 * dense < small <= 0.8 * dense


def test_the_tables_are_those_of_the_results(commands):
    subprocess.run([commands / "python", "-m", "scripts.tables", "--check"], cwd=ROOT, check=True)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(recipe):
    read = read_recipe(recipe)
    make_method(read.method, read.options)
