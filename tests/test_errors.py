"""What a person reads when something is wrong."""

import pytest

from layershare.errors import LONGEST, LayershareError, unknown


@pytest.mark.parametrize("length", [LONGEST + 1, 5000])
def test_names_that_are_too_long_are_cut(length):
    error = LayershareError(f"'{'a' * length}' is no folder; name another one.")
    assert "aaa…aaa" in str(error)
    assert str(error).endswith("aaa' is no folder; name another one.")
    assert len(str(error)) < LONGEST + 50
    assert len(str(unknown("model", "a " * length, ["sample"]))) < LONGEST + 100


def test_sentences_of_many_words_stay():
    sentence = "word " * 1000
    assert str(LayershareError(sentence)) == sentence
