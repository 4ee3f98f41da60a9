"""Settings that cannot be are refused before anything is trained, most of them before a model is read."""

import pytest

from layershare.errors import LayershareError
from layershare.healing.job import prepare_healing
from tests.healing.tiny import compress_tiny, job, settings

TEXT = {"length": 16, "held_out": 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": {"tokens": 999_999_999_999_999}}, "would see 62,499,999,999,999 blocks|would see 62,500,000,000,000"),
        ({"text": {"epochs": 9_999_999}}, "at most 10000"),
        ({"batch_size": 10**9}, "too few for 4 held out and a batch of 1000000000"),
        ({"optimizer": {"arguments": "rank=8"}}, "it takes nothing of 'rank=8'"),
        ({"optimizer": {"targets": ["zz"]}}, "'adamw_torch' projects nothing"),
        ({"optimizer": {"name": "lomo"}}, "You need to install `lomo_optim`"),
        ({"optimizer": {"schedule": "warmup_stable_decay"}}, "'warmup_stable_decay' cannot be used"),
        ({"optimizer": {"schedule": "reduce_lr_on_plateau"}}, "requires an eval strategy"),
        ({"optimizer": {"schedule": "polynomial", "lr": 1e-9}}, "must be smaller than initial lr"),
        ({"loss": {"kind": "distill", "store_teacher": 161}}, "store_teacher=161 is more than the 160 tokens"),
        ({"teacher": "nope"}, "Nothing is asked of the teacher 'nope'"),
        ({"device": "meta"}, "There is no device 'meta'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_training_would_refuse(small, changes, said):
    text = {**TEXT, "text": str(small.parent / "text.txt"), **changes.pop("text", {})}
    with pytest.raises(LayershareError, match=said) as error:
        prepare_healing(settings(small, text=text, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["shortgpt", "slicegpt"])
def test_blocks_that_have_no_counterpart(method, tmp_path, tokenizer, words):
    made = compress_tiny(tmp_path, tokenizer, words, method=method)
    text = {**TEXT, "text": str(tmp_path / "text.txt")}
    with pytest.raises(LayershareError, match="train without replacement"):
        prepare_healing(settings(made, train="full", text=text, replace={}))
    with pytest.raises(LayershareError, match=r"set loss\.hidden to 0"):
        prepare_healing(settings(made, train="full", text=text, loss={"kind": "ce", "hidden": 1.0}))


def test_what_the_model_refuses(small):
    with pytest.raises(LayershareError, match=r"lora\.rank=1000000000 is more than the rank 13"):
        job(small, lora={"rank": 10**9}).student()
    projecting = {"name": "galore_adamw", "targets": ["zz"]}
    with pytest.raises(LayershareError, match=r"has one of optimizer\.targets in its name"):
        job(small, train="factors", optimizer=projecting).student()
