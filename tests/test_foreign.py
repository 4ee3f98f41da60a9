"""Files of others: what their damage becomes."""

import os

import pytest
import yaml

from layershare.errors import LayershareError
from layershare.foreign import parse_yaml, read_mapping, reading

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"null", "it holds null, not an object"),
        (b"[1]", "it holds a list, not an object"),
        (b"3", "it holds a number, not an object"),
        (b'{"a": ', "it is not JSON"),
        (b'{"a": "\xff"}', "it is not UTF-8 text"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 levels deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (LFS.encode(), "git-lfs pointer"),
        (None, "there is no 'file.json'"),
    ],
)
def test_damage_becomes_one_sentence(tmp_path, content, said):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LayershareError, match=said) as error, reading("The file", "write it again"):
        read_mapping(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("The file cannot be used (")
    assert str(error.value).endswith("): write it again.")


def test_a_mark_of_utf8_is_passed_over(tmp_path):
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_mapping(tmp_path / "file.json") == {"a": 1}


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LayershareError, match="'pipe' is no file"), reading("The file", "name another"):
        read_mapping(tmp_path / "pipe")


def test_our_own_sentences_pass():
    with pytest.raises(LayershareError, match=r"^as it is$"), reading("The file", "name another"):
        raise LayershareError("as it is")


def test_any_other_error_is_named():
    with pytest.raises(LayershareError, match=r"The file cannot be used \(AttributeError: what\): name another\."):  # noqa: SIM117
        with reading("The file", "name another"):
            raise AttributeError("what\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "the key 'b' is given twice"),
        ("[" * 20_000, "nested more than 64 levels deep"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested more than 64 levels deep"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        ("a: &x [1]\nb: *x", "references"),
        ("a: [", "it is not YAML"),
        ("[1, 2]: 3", "it is not YAML: found unhashable key"),
    ],
)
def test_strict_yaml(text, said):
    with pytest.raises(LayershareError, match=said), reading("The recipe", "write it again"):
        parse_yaml(text)


def test_strict_yaml_reads_what_yaml_is(tmp_path):
    text = "a: 1\nb: [x, {y: z}]\nc:\n  a: 2\n"
    assert parse_yaml(text) == yaml.safe_load(text)
