import sys
from pathlib import Path

import pytest

from layershare.calibrate import stdlib
from layershare.errors import LayershareError


def test_splits_are_disjoint_and_of_the_promised_sizes():
    train, test = stdlib.documents("train"), stdlib.documents("test")
    assert not set(train) & set(test)
    share = sum(map(len, test)) / sum(map(len, train + test))
    assert 0.03 < share < 0.06
    assert stdlib.documents("test") == test


def test_every_held_out_module_is_in_the_test_split_only():
    assert set(stdlib.HELD_OUT) <= sys.stdlib_module_names
    marks = {"class ArgumentParser(": "test", "class TarFile(": "test", "class OrderedDict(dict)": "train"}
    for mark, split in marks.items():
        found = {name for name in ("train", "test") if any(mark in text for text in stdlib.documents(name))}
        assert found == {split}


def test_leaves_out_tests_packages_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "heapq.py": "held out",
        "json/decoder.py": "held out too",
        "os.py": "kept",
        "email/__init__.py": "kept é",
        "email/empty.py": "\n",
        "test/test_os.py": "test",
        "idlelib/idle_test/test_x.py": "test",
        "lib2to3/tests/all.py": "test",
        "site-packages/pip/x.py": "installed",
        "config-3.11-x86_64/python-config.py": "build",
        "_sysconfigdata__linux.py": "build",
        "sitecustomize.py": "site",
        "pydoc_data/topics.py": "table",
        "encodings/cp437.py": "decoding_table = (\n",
        "encodings/idna.py": "kept last",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    assert stdlib.documents("train") == ["kept é", "kept last", "kept"]
    assert stdlib.documents("test") == ["held out", "held out too"]


def test_a_python_without_its_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(tmp_path / "python311.zip"))
    with pytest.raises(LayershareError, match="source is not installed here"):
        stdlib.documents("train")
