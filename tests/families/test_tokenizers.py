"""The tokenizer that is built from CLIP's merges is CLIP's."""

import gzip

import pytest
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sdlora.families.tokenizers import MERGES, VOCABULARY_SIZE, clip_tokenizer

TEXTS = [
    "",
    "a photo of a cat",
    "A  PHOTO\n of\ta Cat's hat, isn't it?",
    "1girl, (masterpiece:1.2), best_quality",
    "naïve café, Zürich, Ωmega, 日本の猫, эскиз, 😀🏽",
    "<|startoftext|> and <|endoftext|> !",
    "wow!!! ... \\(^o^)/ £5 & 3½%",
    "x" * 300,
]


@pytest.fixture(scope="module")
def reference() -> CLIPTokenizer:
    """Built as OpenAI describes it, with transformers' own table of letters for bytes."""
    merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode().splitlines()]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: number for number, token in enumerate(tokens)}, merges, model_max_length=77)


def test_the_vocabulary_has_clips_size_and_numbers():
    tokenizer = clip_tokenizer("<|endoftext|>")
    known = {
        "!": 0,
        "a</w>": 320,
        "of</w>": 539,
        "photo</w>": 1125,
        "cat</w>": 2368,
        ",</w>": 267,
        "<|startoftext|>": 49406,
        "<|endoftext|>": 49407,
    }
    assert len(tokenizer) == tokenizer.vocab_size == VOCABULARY_SIZE == 49408
    assert {word: tokenizer.convert_tokens_to_ids(word) for word in known} == known
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_the_numbers_that_a_plain_tokenizer_makes_of_them(reference, text):
    options = {"padding": "max_length", "truncation": True}
    assert clip_tokenizer("<|endoftext|>")(text, **options).input_ids == reference(text, **options).input_ids


@pytest.mark.parametrize(("pad", "number"), [("<|endoftext|>", 49407), ("!", 0)])
def test_short_texts_are_filled_up_with_the_given_token(pad, number):
    tokenizer = clip_tokenizer(pad)
    ids = tokenizer("a cat", padding="max_length", truncation=True).input_ids
    assert ids == [49406, 320, 2368, 49407] + [number] * 73
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.model_max_length) == (pad, number, 77)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_folder_written_from_it_is_read_back_alike(tmp_path, pad):
    clip_tokenizer(pad).save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.pad_token == pad
    assert [again(text).input_ids for text in TEXTS] == [clip_tokenizer(pad)(text).input_ids for text in TEXTS]


def test_it_is_built_once():
    assert clip_tokenizer("!") is clip_tokenizer("!")
