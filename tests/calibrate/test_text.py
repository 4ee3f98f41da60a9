import pytest
import torch
from datasets import Dataset

from layershare.calibrate.text import NAMED, load_text, read_documents
from layershare.errors import LayershareError


def load(source, tokenizer, **options):
    return load_text(source, tokenizer, **{"split": "train", "blocks": None, "length": 16, **options})


def test_calibration_text_is_tokenized_by_document_and_chosen_by_the_seed(tokenizer, words):
    text = load(words, tokenizer, blocks=5)
    stream = torch.cat([torch.tensor(tokenizer(document)["input_ids"]) for document in words])
    blocks = stream[: len(stream) // 16 * 16].view(-1, 16)
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(2023))[:5]
    assert torch.equal(text.tokens, blocks[chosen])
    assert not torch.equal(text.tokens, load(words, tokenizer, blocks=5, seed=1).tokens)


def test_evaluation_text_is_joined_and_cut_in_order(tokenizer, words):
    text = load(words, tokenizer, split="test")
    stream = torch.tensor(tokenizer("\n\n".join(words))["input_ids"])
    assert torch.equal(text.tokens.flatten(), stream[: text.tokens.numel()])
    assert len(stream) - text.tokens.numel() < 16


def test_hashes_tell_texts_and_blocks_apart(tokenizer, words):
    one, same, fewer = load(words, tokenizer), load(words, tokenizer), load(words, tokenizer, blocks=3)
    other = load([*words, "x"], tokenizer)
    assert one.identity == same.identity
    assert one.text_sha256 == fewer.text_sha256 != other.text_sha256
    assert one.tokens_sha256 != fewer.tokens_sha256


def test_files_and_folders_hold_the_same_documents(tmp_path, words):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(words[0])
    Dataset.from_dict({"text": words[1:3]}).to_json(folder / "b.jsonl")
    Dataset.from_dict({"text": words[3:5]}).to_parquet(folder / "c.parquet")
    assert read_documents(folder, "train") == ("corpus", words[:5])
    assert read_documents(str(folder / "c.parquet"), "test") == ("c.parquet", words[3:5])


def test_the_standard_library_has_two_parts():
    name, train = read_documents("stdlib", "train")
    assert name == "stdlib"
    assert not set(train) & set(read_documents("stdlib", "test")[1])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitxt2", "Unknown text 'wikitxt2'. Did you mean 'wikitext2'"),
        ([], "empty"),
        (["  ", "\n"], "empty"),
        (["ab"], "less than one block of 16"),
    ],
)
def test_texts_that_cannot_be_used(source, message, tokenizer):
    with pytest.raises(LayershareError, match=message):
        load(source, tokenizer)


def test_a_folder_without_texts(tmp_path, tokenizer):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(LayershareError, match=r"has no \.txt, \.jsonl, \.parquet file"):
        load(tmp_path, tokenizer)


def test_a_data_set_without_a_held_out_part_says_so():
    with pytest.raises(LayershareError, match="no held-out part"):
        NAMED["alpaca"]("test")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "alpaca"])
def test_named_data_sets_without_a_connection_end_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LayershareError, match=r"The data set .* cannot be used .*: check the connection"):
        NAMED[name]("train")
