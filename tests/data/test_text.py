"""Text states are those of the encoder, however they were come by."""

import pytest
import torch

from sdlora.data.cache import Cache
from sdlora.data.text import TextStates, text_fingerprint


def test_states_are_the_encoders_own_from_every_source(tiny_parts, tmp_path):
    captions = ["a cat", "", "a dog", "a cat"]
    states = TextStates(tiny_parts, Cache(tmp_path), 1)
    with torch.no_grad():
        expected = tiny_parts.family.encode_prompts(tiny_parts, captions, 1)["states"]
    first = states(captions)["states"]
    assert first.shape == expected.shape
    torch.testing.assert_close(first, expected)
    assert not first.requires_grad
    assert states.encoded == 3
    assert torch.equal(states(captions)["states"], first)
    assert states.encoded == 3
    again = TextStates(tiny_parts, Cache(tmp_path), 1)
    assert torch.equal(again(captions)["states"], first)
    assert again.encoded == 0


def test_neighbours_and_training_mode_do_not_matter(tiny_parts, tmp_path):
    for module in tiny_parts.text_encoders.values():
        module.train()
    one = TextStates(tiny_parts, Cache(tmp_path / "a"), 1)
    other = TextStates(tiny_parts, Cache(tmp_path / "b"), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = other(["a cat"])["states"]
    assert torch.equal(one(["x", "a cat"])["states"][1:], alone)
    assert alone.dtype == torch.float32
    assert all(module.training for module in tiny_parts.text_encoders.values())


def test_what_changes_the_states_changes_the_key(tiny_parts, tmp_path):
    cache = Cache(tmp_path)

    def encoded(clip_skip=1):
        states = TextStates(tiny_parts, cache, clip_skip)
        states(["a cat", "a cat"])
        return states.encoded

    assert encoded() == 1 and encoded() == 0
    assert encoded(clip_skip=2) == 1
    with torch.no_grad():
        next(tiny_parts.text_encoders["text_encoder"].parameters()).view(-1)[0] += 1
    assert encoded() == 1
    tiny_parts.text_encoders["text_encoder"].to(torch.bfloat16)
    assert encoded() == 1


def test_a_caption_used_once_does_not_fill_the_disk(tiny_parts, tmp_path):
    states = TextStates(tiny_parts, Cache(tmp_path), 1, fingerprint="given")
    states(["a", "b"])
    assert not list(tmp_path.rglob("*.safetensors"))
    states(["b"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_memory_is_bounded(tiny_parts, tmp_path, monkeypatch):
    monkeypatch.setattr("sdlora.data.text.MEMORY_BYTES", 3 * 77 * 16 * 4)
    states = TextStates(tiny_parts, Cache(tmp_path), 1)
    states([str(k) for k in range(3)])
    states(["0"])
    states(["new"])  # "1" has waited longest
    states(["0", "2", "new"])
    assert states.encoded == 4
    states(["1"])
    assert states.encoded == 5


def test_using_a_tokenizer_does_not_change_its_fingerprint(tiny_parts):
    before = text_fingerprint(tiny_parts)
    tiny_parts.family.encode_prompts(tiny_parts, ["a cat"], 1)
    states = TextStates(tiny_parts, Cache(None), 1, fingerprint="given")
    assert states.truncated(["a cat", "cat " * 75, "cat " * 76]) == ["cat " * 76]
    assert text_fingerprint(tiny_parts) == before
    assert states.fingerprint == "given"


def test_what_is_known_before_training_is_encoded_once_and_kept(tiny_parts, tmp_path):
    captions = ["a cat", "", "a dog", "a cat", ""]
    states = TextStates(tiny_parts, Cache(tmp_path), 1)
    lazy = TextStates(tiny_parts, Cache(tmp_path / "other"), 1)
    assert states.preload(captions) and states.encoded == 3
    assert torch.equal(states(captions)["states"], lazy(captions)["states"])
    assert states.encoded == 3
    again = TextStates(tiny_parts, Cache(tmp_path), 1)
    assert again.preload(captions) and again.encoded == 0


def test_in_one_tensor_the_states_are_the_same_bit_by_bit(tiny_parts, tmp_path):
    captions = ["a cat", "", "a dog"]
    states = TextStates(tiny_parts, Cache(tmp_path), 1)
    lazy = TextStates(tiny_parts, Cache(tmp_path / "other"), 1)
    assert not states.to_device([], "cpu")
    assert not states.to_device(captions, "cpu", budget_bytes=1000)
    assert states.to_device(captions, "cpu", budget_bytes=3 * 77 * 16 * 4)
    for batch in (["a dog"], ["a dog", "a dog", ""], ["a cat", "a fish"]):  # nobody knew of the fish
        assert torch.equal(states(batch)["states"], lazy(batch)["states"])
    assert states.encoded == 4


def test_more_captions_than_memory_are_read_from_the_disk(tiny_parts, tmp_path, monkeypatch):
    monkeypatch.setattr("sdlora.data.text.MEMORY_BYTES", 3 * 77 * 16 * 4)
    states = TextStates(tiny_parts, Cache(tmp_path), 1)
    captions = [str(k) for k in range(8)]
    assert not states.preload(captions) and not states.to_device(captions, "cpu")
    states(captions)
    assert states.encoded == 8 and len(states._memory) == 3


@pytest.mark.parametrize("count", [1, 3, 5])
def test_together_captions_become_the_same_up_to_rounding(tiny_parts, tmp_path, monkeypatch, count):
    alone = TextStates(tiny_parts, Cache(tmp_path / "alone"), 1)
    together = TextStates(tiny_parts, Cache(tmp_path / "together"), 1)
    monkeypatch.setattr(TextStates, "together", property(lambda self: 3))
    captions = [f"thing {k}" for k in range(count)]
    assert together.preload(captions) and together.encoded == count
    torch.testing.assert_close(together(captions)["states"], alone(captions)["states"])
