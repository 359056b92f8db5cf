"""Captions are composed in the promised order, by the generator's state and nothing else."""

from pathlib import Path

import pytest

from sdlora.config import DataSection
from sdlora.data.captions import compose, compose_for, split_tags, tag_frequency
from sdlora.data.folder import Example
from sdlora.diffusion.noise import generator


def made(caption, **options):
    return compose(caption, rng=generator("caption", 0), **options)


@pytest.mark.parametrize(
    ("caption", "options", "expected"),
    [
        ("a cat", {}, "a cat"),
        ("a cat", {"trigger": "mystyle"}, "mystyle, a cat"),
        ("a cat in MyStyle", {"trigger": "mystyle"}, "a cat in MyStyle"),
        ("mystyles of cats", {"trigger": "mystyle"}, "mystyle, mystyles of cats"),
        ("", {"trigger": "mystyle"}, "mystyle"),
        ("mystyle", {"trigger": "mystyle"}, "mystyle"),
        (", cat", {"trigger": "mystyle"}, "mystyle, cat"),
        ("c++ (art)", {"trigger": "(art)"}, "c++ (art)"),
        ("a cat", {"trigger": "my style", "trigger_place": "end"}, "a cat, my style"),
        ("A cat. ", {"trigger": "my style", "trigger_place": "end"}, "A cat, my style"),
        ("a cat in My Style", {"trigger": "my style", "trigger_place": "end"}, "a cat in My Style"),
        ("", {"trigger": "my style", "trigger_place": "end"}, "my style"),
        (" ,.", {"trigger": "my style", "trigger_place": "end"}, "my style"),
        (" ,", {"trigger": "mystyle"}, "mystyle"),
        (
            "a cat",
            {"trigger": "my style", "trigger_place": "end", "prefix": "drawing,", "suffix": ", on white"},
            "drawing, a cat, my style, on white",
        ),
        ("a cat", {"prefix": "a drawing of", "suffix": "on white"}, "a drawing of a cat on white"),
        ("a cat", {"prefix": "drawing,", "suffix": ", on white"}, "drawing, a cat, on white"),
        ("a cat", {"prefix": "a photo of", "trigger": "mystyle"}, "a photo of mystyle, a cat"),
        ("a cat", {"prefix": "("}, "(a cat"),
        ("", {"suffix": ", on white"}, "on white"),
        ("", {"prefix": "drawing,"}, "drawing"),
        ("", {}, ""),
        ("a cat", {"trigger": "mystyle", "prefix": "p", "suffix": "s", "dropout": 1.0}, ""),
    ],
)
def test_composition(caption, options, expected):
    assert made(caption, **options) == expected


def test_the_settings_say_what_surrounds_a_caption():
    data = DataSection(trigger="my style", trigger_place="end", caption_prefix="drawing,", caption_suffix=", on white")
    assert compose_for(data, "a cat", rng=generator(0)) == "drawing, a cat, my style, on white"
    assert compose_for(data, "a cat", dropout=1.0, rng=generator(0)) == ""
    words = {"trigger": "my style", "trigger_place": "end", "prefix": "drawing,", "suffix": ", on white"}
    use = {"shuffle": True, "keep": 1}
    expected = compose("a, b, c, d, e, f", **words, **use, rng=generator(3))
    assert compose_for(data, "a, b, c, d, e, f", **use, rng=generator(3)) == expected


def test_shuffling_keeps_the_leading_parts_and_loses_none():
    tags = [f"tag {k}" for k in range(12)]
    got = split_tags(made(", ".join(tags), shuffle=True, keep=3))
    assert got[:3] == tags[:3] and got != tags and sorted(got) == sorted(tags)
    assert made("one", shuffle=True, keep=9) == "one"
    assert made("b,,  a ,", shuffle=True, keep=2) == "b, a"


def test_a_leading_trigger_word_is_not_shuffled_away():
    for seed in range(20):
        text = compose("Mystyle, a, b, c", trigger="mystyle", shuffle=True, rng=generator(seed))
        assert text.startswith("Mystyle, ")


def test_a_trigger_word_at_its_end_is_not_shuffled_away():
    for seed in range(20):
        options = {"trigger": "my style", "trigger_place": "end", "shuffle": True, "rng": generator(seed)}
        text = compose("my style, a, b, c, My Style", **options)
        assert text.endswith(", My Style") and sorted(split_tags(text)) == ["My Style", "a", "b", "c", "my style"]


def test_the_generator_alone_decides():
    def draw(seed, **options):
        return compose("a, b, c, d, e, f", shuffle=True, rng=generator(seed), **options)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(10)}) > 5
    assert {draw(seed, dropout=0.5) for seed in range(50)} <= {"", *(draw(seed) for seed in range(50))}


def test_dropout_drops_the_share_it_says():
    dropped = sum(compose("a cat", dropout=0.25, rng=generator("d", k)) == "" for k in range(2000))
    assert 430 < dropped < 570  # 500 +- 3.6 standard deviations


def test_tags_are_counted_by_group_as_kohya_does():
    def example(caption, group):
        return Example(Path("x.png"), caption, 1, group, 8, 8, "0")

    got = tag_frequency([example("A cat, on white", "10_a"), example("a cat,, ", "10_a"), example("", "b")])
    assert got == {"10_a": {"a cat": 2, "on white": 1}, "b": {}}
