"""Texts are encoded as the family does, each once, and without a look at their neighbours."""

from dataclasses import replace

import pytest
import torch

from sdlora.families import Base, load_parts
from sdlora.sampling.prompts import Prompt
from sdlora.sampling.texts import encode_texts, prompt_chunks


@pytest.fixture(params=["tiny_sd1", "tiny_sdxl"])
def parts(request):
    return load_parts(Base("tiny", request.getfixturevalue(request.param), "test"))


def test_it_is_what_the_family_encodes(parts):
    texts = ["a (cat:1.3)", "", "a hill " * 40]
    ours = encode_texts(parts, texts, 1, 2, {})
    with torch.no_grad():
        theirs = parts.family.encode_prompts(parts, texts, 1, num_chunks=None, emphasis=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


def test_neighbours_do_not_matter_to_the_last_bit(parts):
    alone = encode_texts(parts, ["a cat"], 1, 1, {})
    among = encode_texts(parts, ["a dog", "a cat", "a hill"], 1, 1, {})
    for name, tensor in alone.items():
        assert torch.equal(among[name][1:2], tensor)


def test_each_text_is_encoded_once(parts):
    calls = []

    def encode(parts, texts, *arguments, **options):
        calls.extend(texts)
        return family.encode_prompts(parts, texts, *arguments, **options)

    family = parts.family
    parts = replace(parts, family=replace(family, encode_prompts=encode))
    known = {}
    for _ in range(2):
        encode_texts(parts, ["a cat", "", "a cat"], 1, 1, known)
    assert calls == ["a cat", ""]
    encode_texts(parts, ["a cat"], 2, 1, known)
    encode_texts(parts, ["a cat"], 1, 2, known)
    assert calls == ["a cat", "", "a cat", "a cat"]


def test_encoders_that_train_are_asked_without_dropout_and_go_on_training(parts):
    encoder = parts.text_encoders["text_encoder"].train()
    during = []
    encoder.register_forward_hook(lambda m, i, o: during.append((m.training, torch.is_grad_enabled())))
    encode_texts(parts, ["a cat"], 1, 1, {})
    assert during == [(False, False)]
    assert encoder.training


def test_a_prompt_is_as_long_as_the_longer_of_its_texts(parts):
    assert prompt_chunks(parts, Prompt("a cat")) == 1
    assert prompt_chunks(parts, Prompt("a cat", "dark BREAK blurry")) == 2
