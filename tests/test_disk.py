"""A disk that is full, a limit, a folder that goes away: a sentence, and the same command continues."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import layershare as api
from layershare.disk import require_disk, still_needed, writing
from layershare.errors import LayershareError
from layershare.folders import WORK
from layershare.run import run
from layershare.store import write_atomically
from tests.families import tiny_model
from tests.test_cli import COMPRESS, here, layershare  # noqa: F401
from tests.test_run import recipe_for, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


@contextmanager
def files_of_at_most(count: int):
    """No file that is written becomes larger than so many bytes; the system answers as it does for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_run_that_finds_the_disk_full_goes_on_when_it_is_not(folder, tmp_path):
    recipe = recipe_for(folder, method="svd", max_shard_size="80KB")
    run(recipe, tmp_path / "whole", pages=False)
    stopped = set()
    for count in (100, 7_000, 45_000):  # more and more of its files fit
        said = r"cannot be written \(file too large.*the same command continues"
        with pytest.raises(LayershareError, match=said), files_of_at_most(count):
            run(recipe, tmp_path / "out", pages=False)
        assert not (tmp_path / "out" / "config.json").exists()
        assert not [*tmp_path.rglob("*.part")]
        stopped |= {path.parent.name for path in tmp_path.rglob(f"{WORK}/**/*.safetensors")}
    assert {"units", "model"} <= stopped
    run(recipe, tmp_path / "out", pages=False)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_what_an_earlier_run_has_left_is_not_asked_of_the_disk_again(tmp_path):
    assert still_needed(100, tmp_path / "none") == 100
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit" / "a").write_bytes(bytes(30))
    assert still_needed(100, tmp_path) == 70
    assert still_needed(20, tmp_path) == 0


def test_what_several_folders_need_of_one_disk_is_added_up(tmp_path):
    half = shutil.disk_usage(tmp_path).free * 3 // 5
    require_disk({tmp_path / "a": half, tmp_path / "b": 0})
    with pytest.raises(LayershareError, match=r"disk in '.*/a' and '.*/b', where .* are free; free some or name"):
        require_disk({tmp_path / "a": half, tmp_path / "b": half})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small file system")
def test_a_run_on_a_disk_that_fills_up(folder, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        free = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: free)
            with pytest.raises(LayershareError, match=r"no space left on device.*the same command continues"):
                run(recipe_for(folder), disk / "out", pages=False)
        assert not (disk / "out" / "config.json").exists()
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        run(recipe_for(folder), disk / "out", pages=False)
        run(recipe_for(folder), tmp_path / "whole", pages=False)
        assert weights_of(disk / "out") == weights_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_every_verb_ends_in_a_sentence(layershare, here):  # noqa: F811
    assert layershare(*COMPRESS, "-m", "svd")[0] == 0
    text = ("--text", "text.txt", "--length", "64")
    heal = ("heal", "small", *text, "--train", "norms", "--tokens", "512", "--batch-size", "4")
    speed = ("bench", "small", "--prompt", "8", "--new", "2", "--rounds", "1")
    into_folders = (
        ("calibrate", "dense", *text, "--blocks", "8"),
        ("compress", "dense", *text, "--blocks", "8", "-m", "svd-llm", "--effort", "blocks"),
        ("compress", "dense", *text, "--blocks", "8", "-m", "slicegpt"),
        (*heal, "--set", "text.held_out=4"),
        ("export", "small", "--to", "dense"),
    )
    into_files = (("plan", "dense", "-m", "svd"), ("eval", "small", *text, "--blocks", "1"), speed, ("report", "small"))
    for arguments in (*into_folders, *into_files):
        if arguments in into_folders:
            with files_of_at_most(12_000):  # more than what is printed, which is captured in files, too
                code, _, err = layershare(*arguments, "-o", "out")
            assert (code, "cannot be written (" in err, "Traceback" in err) == (2, True, False), (arguments, err)
            assert not [*here.glob("out/config.json"), *here.rglob("*.part")]
            shutil.rmtree(here / "out", ignore_errors=True)
        code, _, err = layershare(*arguments, "-o", "/dev/full")
        assert (code, "'/dev/full' " in err, "name a" in err) == (2, True, True), (arguments, err)
    with pytest.raises(LayershareError, match="no space left on device"), writing(Path("/dev/full")):
        write_atomically(Path("/dev/full"), b"text")
    assert Path("/dev/full").is_char_device()


def test_a_folder_that_goes_away_and_one_that_cannot_be(folder, tmp_path):
    def remove(step):
        if step == "solve":
            shutil.rmtree(tmp_path / "out")
        return lambda done, total: None

    with pytest.raises(LayershareError, match=r"cannot be written \(no such file or directory.*same command continues"):
        run(recipe_for(folder, method="svd"), tmp_path / "out", announce=remove)
    for name in ("/proc/nowhere/out", str(tmp_path / ("a" * 300)), "/dev/full/out"):
        with pytest.raises(LayershareError, match="name a"):
            run(recipe_for(folder, method="svd"), name)
        with pytest.raises(LayershareError, match="name a"):
            api.save(tiny_model("llama"), name)


def test_what_is_converted_before_it_is_read_needs_room(folder, tmp_path):
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    said = "cannot be read without room on the disk .*run the command again"
    with pytest.raises(LayershareError, match=said), files_of_at_most(5000):
        run(recipe_for(folder, method="svd"), tmp_path / "out", pages=False)
    assert not (tmp_path / "out").exists()
    run(recipe_for(folder, method="svd"), tmp_path / "out", pages=False)


def test_room_is_asked_for_before(folder, tmp_path, monkeypatch, layershare):  # noqa: F811
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    for verb in (
        ("calibrate", "--text", str(tmp_path / "text.txt"), "--length", "64", "--blocks", "8"),
        ("export", "--to", "dense"),
    ):
        code, _, err = layershare(verb[0], str(folder), "-o", str(tmp_path / "out"), *verb[1:])
        assert (code, "of disk in" in err and "1 kB are free" in err) == (2, True)
        assert not (tmp_path / "out").exists()


def test_what_torch_says_of_a_full_disk_is_understood_and_other_errors_pass(tmp_path):
    with pytest.raises(LayershareError, match="not be written to its end"), writing(tmp_path), files_of_at_most(99):
        torch.save(torch.zeros(9999), tmp_path / "file.pt")
    mistake = KeyError("of ours, while an error was dealt with")
    mistake.__context__ = FileNotFoundError(2, "No such file")
    with pytest.raises(KeyError), writing(tmp_path):
        raise mistake
