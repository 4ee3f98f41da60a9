"""What goes along with a model: its licence, the files of its tokenizer, where it comes from."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from layershare.model.original import LARGEST, copy_side_files, files_of, known_of, located, source_of
from tests.families import tiny_model

CARRIED = {
    *("LICENSE", "LICENSE.txt", "license.md", "Llama-LICENSE.txt", "LICENCE", "COPYING", "NOTICE", "Notice.txt"),
    *("USE_POLICY.md", "THIRD_PARTY_NOTICES.md", "tokenizer.model", "tokenizer.model.v3", "spiece.model"),
    *("sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
}
LEFT = {
    *("README.md", "model.safetensors", "license.safetensors", "pytorch_model.bin", "license_check.py", "modeling.py"),
    *("config.json", "results.json", "training_args.bin", "notice.sh", "optimizer.model"),
}


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "to").mkdir()
    return tmp_path / "model"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_documents_and_vocabularies_go_along_and_nothing_else(model, tmp_path):
    for name in CARRIED | LEFT:
        (model / name).write_text(f"{name} of the original")
    (tmp_path / "to" / "NOTICE").write_text("written before")
    copy_side_files(model, tmp_path / "to")
    assert names(tmp_path / "to") == CARRIED
    assert (tmp_path / "to" / "NOTICE").read_text() == "written before"
    assert (tmp_path / "to" / "LICENSE").read_bytes() == (model / "LICENSE").read_bytes()


def test_the_vocabulary_of_another_tokenizer_stays(model, tmp_path):
    for name in ("LICENSE", "tokenizer.model"):
        (model / name).touch()
    copy_side_files(model, tmp_path / "to", vocabulary=False)
    assert names(tmp_path / "to") == {"LICENSE"}


def outside(file: Path) -> None:
    (file.parents[1] / "secret").write_text("secret")
    file.symlink_to(Path("..") / "secret")


def huge(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.truncate(LARGEST + 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (outside, "it lies outside the model's folder"),
        (huge, "it is larger than 64 MB"),
        (os.mkfifo, "'LICENSE' is no file"),
        (Path.mkdir, "'LICENSE' is no file"),
        (lambda file: file.symlink_to(file), "there is no 'LICENSE'"),
        (lambda file: file.symlink_to("nowhere"), "there is no 'LICENSE'"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    ],
)
def test_what_cannot_be_taken_along_is_said(spoil, message, model, tmp_path):
    spoil(model / "LICENSE")
    (model / "NOTICE").touch()
    with pytest.warns(UserWarning, match=f"'LICENSE' of the original is not in the result: .*{message}"):
        copy_side_files(model, tmp_path / "to")
    assert names(tmp_path / "to") == {"NOTICE"}


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The snapshot of `someone/model` in the hub's cache, which is all there is of it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    contents = {"config.json": "{}", "LICENSE": "mine", "tokenizer.model": "bytes", "README.md": CARD}
    for number, (name, content) in enumerate(contents.items()):
        (repository / "blobs" / str(number)).write_text(content)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    return snapshot


CARD = "---\nlicense: other\nlicense_name: its-own\nlicense_link: LICENSE\nbase_model: a/b\n---\n# Its card\n"
LICENCE = {"license": "other", "license_name": "its-own", "license_link": "LICENSE"}


def test_an_original_in_the_hub_s_cache(cached, tmp_path):
    assert files_of("someone/model") == cached
    assert files_of("someone/else") is None
    assert files_of("no hub id!") is None
    (tmp_path / "to").mkdir()
    copy_side_files(cached, tmp_path / "to")
    assert {path.name: path.read_text() for path in (tmp_path / "to").iterdir()} == {
        "LICENSE": "mine",
        "tokenizer.model": "bytes",
    }
    assert not any(path.is_symlink() for path in (tmp_path / "to").iterdir())
    assert known_of("someone/model", cached) == {**LICENCE, "base_model": "someone/model"}


def test_the_sample_has_a_licence_and_no_name_on_the_hub():
    assert known_of("sample", files_of("sample")) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("card", "known"),
    [
        (CARD, LICENCE),
        ("\ufeff" + CARD.replace("\n", "\r\n"), LICENCE),
        ("# No front matter", {}),
        ("---\n---\n# Empty", {}),
        ("", {}),
        ("---\nlicense:\n---\n", {}),
        ("---\nlicense: [mit]\nlicense_name: 5\n---\n", {}),
        ("---\ntags: [layershare]\nbase_model: a/b\n---\n", {"base_model": "a/b"}),  # one of ours
        ("---\ntags: layershare\nbase_model: a/b\n---\n", {}),
    ],
)
def test_what_an_original_s_card_says(card, known, model):
    (model / "README.md").write_text(card, newline="")
    assert known_of(str(model), model) == known


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n---\n",
        b"---\n- mit\n---\n",
        b"---\nmit\n---\n",
        b"---\nlicense: caf\xe9\n---\n",
        b"---\nlicense: mit\nlicense: gpl\n---\n",
        b"---\na: " + b"[" * 100_000 + b"\n---\n",
        b"---\na: !!python/object/apply:os.getcwd []\n---\n",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=lambda card: str(card[:40]),
)
def test_a_card_that_cannot_be_read_is_said_and_costs_nothing(card, model):
    (model / "README.md").write_bytes(card)
    with pytest.warns(UserWarning, match=r"^The README.md of '.*' cannot be used \(.*\): write the original's licence"):
        assert known_of(str(model), model) == {}


def test_a_card_that_is_no_file(model):
    os.mkfifo(model / "README.md")
    with pytest.warns(UserWarning, match=r"'README\.md' is no file"):
        known_of(str(model), model)


def test_a_name_means_the_same_everywhere(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model)
    assert {located(name) for name in (".", "../model", "../model/", str(model))} == {str(model)}
    others = ["sample", "someone/model", "nowhere", "x" * 5000, "\0"]
    assert [located(name) for name in others] == others


def test_a_model_in_memory_has_a_source_only_where_that_is_certain(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = tiny_model("llama")
    assert source_of(loaded) is None
    loaded.name_or_path = "model"
    assert source_of(loaded) == str(model)
    loaded.name_or_path = "someone/model"
    assert source_of(loaded) is None
    loaded.config._commit_hash = "a" * 40
    assert source_of(loaded) == "someone/model"
