import json
import re
import subprocess
import sys
from dataclasses import dataclass
from threading import Timer
from typing import Any

import pytest

from layershare.errors import LayershareError
from layershare.store import as_json, only_one, write_json, written_with

HOLDER = """
import sys, time
from pathlib import Path
from layershare.store import only_one
with only_one(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is working in the folder `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    with process:
        yield process
        process.kill()


def test_a_second_process_is_kept_out_until_the_first_is_done(tmp_path, holder):
    sentence = f"Another process is working in '{tmp_path / 'out'}'; wait until it is done"
    with pytest.raises(LayershareError, match=re.escape(sentence)), only_one(tmp_path / "out"):
        pass
    with only_one(tmp_path / "other"):
        pass
    holder.communicate("done\n")
    with only_one(tmp_path / "out"):
        pass


def test_a_killed_process_leaves_the_folder_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    with only_one(tmp_path / "out"):
        pass


def test_who_waits_says_so_and_goes_on_when_the_other_is_done(tmp_path, holder):
    later = Timer(0.3, holder.stdin.close)
    later.start()
    with pytest.warns(UserWarning, match="waiting until it is done"), only_one(tmp_path / "out", wait=True):
        assert later.finished.is_set()


def test_json_keeps_names_of_files_that_are_no_utf8(tmp_path):
    write_json(tmp_path / "file.json", {"text": "é\udcff.txt"})
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == {"text": "é\udcff.txt"}


@dataclass
class Noted:
    x: float | None = written_with("x")
    y: float | None = written_with("x")
    z: float | None = None
    more: tuple[Any, ...] = ()


def test_json_leaves_out_what_belongs_to_nothing():
    assert as_json(Noted()) == {"z": None, "more": []}
    inner = {"z": 1, "more": []}
    assert as_json({"a": Noted(x=1.0, more=(Noted(y=2.0, z=1),))}) == {
        "a": {"x": 1, "y": None, "z": None, "more": [inner]}
    }
