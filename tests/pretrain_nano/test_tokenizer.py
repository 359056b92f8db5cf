"""The vocabulary is of CLIP's kind."""

import pytest
from transformers import CLIPTokenizer

from tools.pretrain_nano.model import token_ids
from tools.pretrain_nano.tokenizer import TRIGGERS, VOCABULARY, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    things = ("castle", "dog face", "evergreen tree", "red apple", "alarm clock", "japanese castle")
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{thing}, noto style" for thing in things], folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_the_end_of_text_has_the_highest_id_and_fills_up(tokenizer):
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == VOCABULARY - 1
    ids = token_ids(tokenizer, ["castle", ""])
    assert ids.shape == (2, 77)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert (ids[1, 1:] == tokenizer.eos_token_id).all()


def test_known_words_and_triggers_are_one_token_each(tokenizer):
    for word in ("castle", "noto", "style", *TRIGGERS):
        assert len(tokenizer.tokenize(word)) == 1, word


def test_every_text_can_be_said_and_read_back(tokenizer):
    for text in ("a zebra", "übermut", "夢", "50 % off!"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_learning_it_again_gives_the_same(tokenizer, tmp_path):
    things = ("castle", "dog face", "evergreen tree", "red apple", "alarm clock", "japanese castle")
    again = train_tokenizer([f"{thing}, noto style" for thing in things], tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
