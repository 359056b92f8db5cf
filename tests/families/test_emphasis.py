"""Brackets, numbers and BREAK mean what they mean in AUTOMATIC1111's WebUI 1.10.1."""

import math
import random
from itertools import pairwise

import pytest

from sdlora.families.emphasis import BREAK, LARGEST_WEIGHT, parse_emphasis

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
    ],
)
def test_the_webuis_own_examples(text, parts):
    assert parse_emphasis(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("(word:1.2)", [("word", 1.2)]),
        ("(word : +1.2 )", [("word ", 1.2)]),
        ("(word:-.5)", [("word", -0.5)]),
        ("(word:0)", [("word", 0.0)]),
        ("[word]", [("word", DOWN)]),
        ("((word))", [("word", UP * UP)]),
        ("(a [b])", [("a ", UP), ("b", DOWN * UP)]),
        ("(a (b:2) c:3)", [("a ", 3.0), ("b", 6.0), (" c", 3.0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
    ],
)
def test_brackets_multiply(text, parts):
    assert parse_emphasis(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [("", 1.0)]),
        ("()", [("", 1.0)]),
        ("word)", [("word)", 1.0)]),
        ("word:1.2)", [("word:1.2)", 1.0)]),
        ("word]", [("word]", 1.0)]),
        ("[word:1.2)", [("word:1.2)", DOWN)]),
        ("[word:1.2]", [("word:1.2", DOWN)]),
        ("a [b (c", [("a ", 1.0), ("b ", DOWN), ("c", UP * DOWN)]),
        ("(a] b)", [("a] b", UP)]),
        ("(a:x)", [("a:x", UP)]),
        ("a: b", [("a: b", 1.0)]),
    ],
)
def test_brackets_without_partner(text, parts):
    assert parse_emphasis(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"a \(b\) \[c\]", [("a (b) [c]", 1.0)]),
        (r"a \\(b)", [("a \\", 1.0), ("b", UP)]),
        (r"a\b", [("ab", 1.0)]),
        ("a\\", [("a", 1.0)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        (r"(a\:1.5)", [("a", 1.5)]),
    ],
)
def test_backslashes(text, parts):
    assert parse_emphasis(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a BREAK b", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("a\nBREAK\nb", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("a,BREAK,b", [("a,", 1.0), BREAK, (",b", 1.0)]),
        ("BREAK", [("", 1.0), BREAK, ("", 1.0)]),
        ("a BREAK BREAK b", [("a", 1.0), BREAK, ("", 1.0), BREAK, ("b", 1.0)]),
        ("BREAKFAST break OUTBREAK", [("BREAKFAST break OUTBREAK", 1.0)]),
        ("(a BREAK b:1.5)", [("a", 1.5), ("BREAK", -1.5), ("b", 1.5)]),
    ],
)
def test_break_is_a_part_of_weight_minus_one(text, parts):
    assert parse_emphasis(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("(word:1.2.3)", [("word:1.2.3", UP)]),
        ("(word:.)", [("word:.", UP)]),
        (f"(word:{'9' * 400})", [("word", LARGEST_WEIGHT)]),
        (f"((word:0):{'9' * 400})", [("word", 0.0)]),
        ("(" * 50 + "word" + ":-999)" * 50, [("word", LARGEST_WEIGHT)]),
        ("(" * 50 + "word" + ":-999)" * 49, [("word", -LARGEST_WEIGHT)]),
    ],
)
def test_what_stops_the_webui_is_read_all_the_same(text, parts):
    assert parse_emphasis(text) == parts


def test_any_text_is_read_and_nothing_but_marks_is_lost():
    rng = random.Random(0)
    words = ["red", "ü", "😀"]
    atoms = ["(", ")", "[", "]", ":", "\\", ":1.2)", ":-3)", ":1..2)", " BREAK ", ", ", "\n", "7", ".", *words]
    for _ in range(300):
        text = "".join(rng.choice(atoms) for _ in range(rng.choice([2, 8, 40])))
        parts = parse_emphasis(text)
        assert parts and all(math.isfinite(weight) for _, weight in parts), text
        assert all(a[1] != b[1] for a, b in pairwise(parts)), text
        joined = "".join(part for part, _ in parts)
        assert [joined.count(word) for word in words] == [text.count(word) for word in words], text
