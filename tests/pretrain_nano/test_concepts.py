"""Twins are one concept, and no split parts them."""

import json

import pytest

from tools.pretrain_nano.build import MANIFEST
from tools.pretrain_nano.concepts import SPLITS, base_concept, clean, normal_code, read_concepts, split_of
from tools.pretrain_nano.sources import BASE_STYLES, HELD_OUT_STYLES, SHA256, STYLES


@pytest.mark.parametrize(
    "twins",
    [
        ("man astronaut", "woman astronaut", "astronaut"),
        ("person running: facing right", "woman running", "man running"),
        ("one o'clock", "ten-thirty"),
        ("blue heart", "light blue heart", "grey heart"),
        ("family: man, woman, boy", "kiss: woman, woman", "couple with heart"),
        ("merman", "mermaid"),
        ("japanese here button", "japanese secret button"),
        ("up-left arrow", "down arrow", "left-right arrow"),
        ("men wrestling", "people wrestling"),
    ],
)
def test_twins_share_their_base_concept(twins):
    assert len({base_concept(label) for label in twins}) == 1


@pytest.mark.parametrize(
    "strangers",
    [("dog", "dog face"), ("castle", "japanese castle"), ("heart suit", "red heart"), ("man's shoe", "running shoe")],
)
def test_other_things_stay_apart(strangers):
    assert len({base_concept(label) for label in strangers}) == len(strangers)


def test_the_split_shares_are_kept():
    splits = [split_of(f"thing {n}") for n in range(4000)]
    assert sum(SPLITS.values()) == 100
    for split, share in SPLITS.items():
        assert abs(splits.count(split) / 40 - share) < 3


def test_read_concepts_leaves_out_flags_and_skin_tones(tmp_path):
    entries = [
        {"label": "castle", "hexcode": "1F3F0", "tags": ["building", "castle"], "group": 5, "order": 2},
        {"label": "flag: Japan", "hexcode": "1F1EF-1F1F5", "group": 9, "order": 3},
        {"label": "medium skin tone", "hexcode": "1F3FD", "group": 2, "order": 4},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {"label": "Japanese “here” button", "hexcode": "1F201-FE0F", "tags": [], "group": 8, "order": 1},
    ]
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "data.json").write_text(json.dumps(entries))
    concepts = read_concepts(tmp_path)
    assert [(c.code, c.label, c.tags) for c in concepts] == [
        ("1f201", "japanese here button", ()),
        ("1f3f0", "castle", ("building",)),
    ]
    assert concepts[0].base == "japanese button"


def test_names_are_brought_to_one_form():
    assert normal_code("23-FE0F-20E3") == "0023-20e3"
    assert clean("Woman’s  “Hat”!") == "woman's hat"


def test_the_manifest_tells_what_the_sources_tell():
    manifest = json.loads(MANIFEST.read_text())
    assert manifest["archives_sha256"] == SHA256
    assert set(manifest["styles"]) == {style.id for style in STYLES}
    for style in STYLES:
        row = manifest["styles"][style.id]
        assert (row["package"], row["licence"], row["role"]) == (style.package, style.licence, style.role)
        assert row["pictures"] == sum(row["by_split"].values())


def test_shipped_weights_learn_from_no_share_alike_set_and_no_held_out_style():
    assert {"fluent-3d", "openmoji", "openmoji-black", "emojione-v1"} == set(HELD_OUT_STYLES)
    for style in STYLES:
        if style.id in BASE_STYLES:
            assert style.licence in {"Apache-2.0", "MIT", "CC-BY-4.0"}
    assert "fluent-modern" not in BASE_STYLES  # it is fluent-3d, drawn again
