"""The house: what a room imports lies below it, so that no two rooms need each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import layershare

HOUSE = """
    __main__
    cli
    __init__
    api
    run · quantizing · exporting
    steps · trials
    job
    healing
    report
    methods · solve · evaluate
    plan
    calibrate · serve
    model
    folders
    manifest · bars · recipe
    store · foreign
    disk · device · formulas · progress · console
    errors · units · values · autoload · connection · memory
"""
"""The rooms, from the roof to the ground; those on one floor do not import each other."""

ROOT = Path(layershare.__file__).parent
FLOORS = [line.strip().split(" · ") for line in HOUSE.strip().splitlines()]
HEIGHT = {room: -number for number, floor in enumerate(FLOORS) for room in floor}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """The files of the package that a file imports, those only for its types or inside of functions among them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "layershare":
                found = (parts[:n] + end for n in range(len(parts), -1, -1) for end in ([], ["__init__"]))
                yield next(file for file in map(".".join, found) if file in FILES)


GRAPH = {name: set(imports(path)) for name, path in FILES.items()}


def room(file: str) -> str:
    return file.partition(".")[0]


def test_the_house_has_all_rooms_and_no_others():
    assert set(HEIGHT) == {room(file) for file in FILES if not file.startswith("sample")}


def test_rooms_import_only_what_lies_below_them():
    wrong = {
        f"{file} imports {other}"
        for file, others in GRAPH.items()
        for other in others
        if room(file) != room(other) and HEIGHT[room(other)] >= HEIGHT[room(file)]
    }
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    left = dict(GRAPH)
    while free := [file for file, others in left.items() if not others & left.keys()]:
        for file in free:
            del left[file]
    assert not left, f"in circles, or above one: {sorted(left)}"
