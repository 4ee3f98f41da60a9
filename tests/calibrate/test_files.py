"""Text files as people have them: encodings, rows, folders, and what is no text."""

import gzip
import json
import os
import socket

import pyarrow
import pytest
from pyarrow import parquet

from layershare.calibrate.text import load_text, read_documents
from layershare.errors import LayershareError

STORY = "Häuser – “two” lines\nand more, 漢字 and 🙂"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


def documents(path, tokenizer=None) -> list[str]:
    return read_documents(path, "train", tokenizer)[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["le", "be"])
def test_encodings_are_known_by_their_marks(tmp_path, encoding, order):
    wide = encoding in ("utf-16", "utf-32")
    write = (
        (lambda text: f"\ufeff{text}".encode(f"{encoding}-{order}")) if wide else (lambda text: text.encode(encoding))
    )
    (tmp_path / "a.txt").write_bytes(write(STORY))
    (tmp_path / "a.JSONL").write_bytes(write(f'\r\n{{"text": {json.dumps(STORY)}}}\r\n \n\n{{"text": "x"}}'))
    assert documents(tmp_path / "a.txt") == [STORY]
    assert documents(tmp_path / "a.JSONL") == [STORY, "x"]


ROW = b'{"text": "a"}\n'
NO_TEXT = {
    "cp1252": ("a.txt", "Häuser – x".encode("cp1252"), r"not UTF-8 \(byte 1\); .*iconv -f WINDOWS-1252 -t UTF-8"),
    "far on": ("a.txt", b"a" * 3_000_000 + b"\xe9", r"not UTF-8 \(byte 3000000\)"),
    "on an edge": ("a.txt", b"a" * ((1 << 20) - 1) + "é".encode() + b"\xff", r"not UTF-8 \(byte 1048577\)"),
    "cut": ("a.txt", "é".encode()[:1], r"not UTF-8 \(byte 0\)"),
    "unmarked utf-16": ("a.txt", "some text".encode("utf-16-le"), "NUL characters"),
    "half a utf-16": ("a.txt", b"\xff\xfea\0b", r"mark of UTF-16 but is damaged at byte 4"),
    "broken utf-8": ("a.txt", b"\xef\xbb\xbfab\xff", r"mark of UTF-8 but is damaged at byte 5"),
    "gzip": ("a.txt", gzip.compress(b"some text"), "'.*a.txt' is a binary file"),
    "zip": ("a.txt", b"PK\x03\x04\x14\0\0\0text", "NUL"),
    "safetensors": ("a.txt", b"\x40\0\0\0\0\0\0\0{}", "NUL"),
    "git-lfs": ("a.txt", LFS, "git-lfs pointer.*git lfs pull"),
    "empty": ("a.txt", b" \n", "'a.txt' is empty"),
    "mark alone": ("a.txt", b"\xef\xbb\xbf", "'a.txt' is empty"),
    "json": ("a.json", b"{}", "'a.json' is not of a kind that is read; give a .txt, .jsonl or .parquet file"),
    "gz": ("a.txt.gz", b"", "'a.txt.gz' is not of a kind"),
    "csv": ("a.csv", b"text\na", "'a.csv' is not of a kind"),
    "no suffix": ("corpus", b"text", "'corpus' is not of a kind"),
    "cp1252 rows": ("a.jsonl", ROW + '{"text": "é"}'.encode("cp1252"), r"not UTF-8 \(byte 24\)"),
    "no json": ("a.jsonl", ROW + b"\n{'text': 1}", "Line 3 of 'a.jsonl' is not JSON"),
    "two values": ("a.jsonl", b'{"text": "a"} {"text": "b"}', "Line 1 of 'a.jsonl' is not JSON"),
    "a list": ("a.jsonl", b'["a"]', r"Line 1 of 'a.jsonl' has no field 'text' \(found: list\)"),
    "null": ("a.jsonl", ROW + b'{"text": null}', "Line 2 of 'a.jsonl' has a 'text' that is no text"),
    "surrogate": ("a.jsonl", b'{"text": "a\\ud800"}', r"Line 1 .* half a character \(a lone surrogate, '\\ud800'\)"),
    "brackets": ("a.jsonl", ROW + b"[" * 100_000, "Line 2 .* nested too deeply"),
    "digits": ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "Line 1 .*Exceeds the limit"),
    "no parquet": ("a.parquet", b"PAR1 and more", "a.parquet' cannot be used .*write it again"),
    "empty parquet": ("a.parquet", b"", "a.parquet' cannot be used"),
    "chat": ("a.jsonl", b'{"messages": []}', "no chat template"),
}


@pytest.mark.parametrize("case", NO_TEXT)
def test_what_is_no_text_is_refused_with_the_place(case, tmp_path, tokenizer):
    name, content, message = NO_TEXT[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LayershareError, match=message) as error:
        documents(tmp_path / name, tokenizer)
    assert "\n" not in str(error.value)


def test_damaged_parquet(tmp_path):
    good = tmp_path / "good.parquet"
    parquet.write_table(pyarrow.table({"text": ["abc" * 100] * 300}), good, compression="none")
    assert len(documents(good)) == 300
    cut, spoilt = tmp_path / "cut.parquet", tmp_path / "spoilt.parquet"
    cut.write_bytes(good.read_bytes()[:-20])
    spoilt.write_bytes(b"PAR1" + b"\xff" * 60 + good.read_bytes()[64:])
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "numbers.parquet")
    for name, message in {
        "cut": "cannot be used",
        "spoilt": "cannot be used",
        "other": r"'other.parquet' has no field 'text' \(found: body\)",
        "numbers": r"Row 1 of 'numbers.parquet' has a 'text' that is no text \(1\)",
    }.items():
        with pytest.raises(LayershareError, match=message):
            documents(tmp_path / f"{name}.parquet")


@pytest.fixture
def chatting(tokenizer):
    """The tokenizer, with a chat template that wants turns to alternate."""
    template = (
        "{{ bos_token }}{% for each in messages %}{% if (each.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}<{{ each.role }}> {{ each.content }}\n{% endfor %}"
    )
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    yield tokenizer
    tokenizer.chat_template = before


def test_conversations_are_written_out_by_the_chat_template(tmp_path, chatting):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + '\n{"text": "plain"}\n')
    parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "chat.parquet")
    written = "<s><user> hi\n<assistant> ho\n"  # this tokenizer adds no token of its own in front
    assert documents(tmp_path / "chat.jsonl", chatting) == [written, "plain"]
    assert documents(tmp_path / "chat.parquet", chatting) == [written]
    for messages in (turns[::-1], None, 3, ["x"], [{"role": "user", "content": "\ud800"}]):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": messages}))
        with pytest.raises(LayershareError, match=r"[Ll]ine 1 of 'bad.jsonl'"):
            documents(tmp_path / "bad.jsonl", chatting)


def test_folders(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "b.TXT").write_text("two")
    (folder / "a.txt").write_text("one")
    (folder / "part" / "loop").symlink_to(folder)
    assert documents(folder) == ["one", "two"]
    others = [folder / name for name in ("notes.md", "rows.csv")]
    for other in others:
        other.write_text("x")
    with pytest.warns(UserWarning, match=r"Of the 4 files in '.*corpus', 2 are not a .txt, .* such as 'notes.md'"):
        assert documents(folder) == ["one", "two"]
    for other in others:
        other.unlink()
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LayershareError, match=r"There is no text file '.*gone\.txt'"):
        documents(folder)
    (folder / "gone.txt").unlink()
    (folder / "z.txt").write_bytes(b"\xff")
    with pytest.raises(LayershareError, match=r"z\.txt' is not UTF-8"):
        documents(folder)


def test_an_unreadable_folder_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "locked").mkdir()
    list_folder = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(LayershareError, match=r"cannot be used \(permission denied\)"):
        documents(tmp_path)


def test_pipes_devices_and_sockets_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.txt"))
        for name in (tmp_path / "pipe.txt", tmp_path / "socket.txt", "/dev/null", tmp_path):
            with pytest.raises(LayershareError, match="is a pipe, device or socket"):
                documents(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "The text has no name; give alpaca, c4"),
        (" ", "The text has no name"),
        ("story.txt", "There is no text file or folder 'story.txt'"),
        ("./story", "There is no text file or folder './story'"),
        ("a/b", "There is no text file or folder 'a/b'"),
        ("~story", "There is no text file or folder '~story'"),
        ("wikitxt2", "Unknown text 'wikitxt2'. Did you mean 'wikitext2'"),
        ("x" * 5000, "Unknown text 'x{100}"),
        ("a\0b", "Unknown text"),
    ],
)
def test_names_that_are_none(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LayershareError, match=message):
        documents(name)


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        (3, "not of type 'int'"),
        (None, "not of type 'NoneType'"),
        (b"text", "not of type 'bytes'"),
        ({"text": "a"}, "not of type 'dict'"),
        (["a", 3], r"String 2 of the text is no text \(3\)"),
        (["a", None], "String 2 of the text is no text"),
        (["a\ud800"], "String 1 of the text holds half a character"),
    ],
)
def test_in_python_a_text_is_a_name_or_strings(strings, message):
    with pytest.raises(LayershareError, match=message):
        documents(strings)


def test_strings_may_come_one_by_one(words):
    assert documents(word for word in words) == words


def test_fewer_blocks_than_asked_for_are_said(tokenizer, words):
    with pytest.warns(UserWarning, match="'strings' has 12 blocks of 16 tokens, not the 500 asked for"):
        assert len(load_text(words[:1], tokenizer, split="test", blocks=500, length=16).tokens) == 12
