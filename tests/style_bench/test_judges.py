"""The judges of the bench: their interface, the gallery's fairness, and the formula behind the concept judge."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tools.pretrain_nano.sources import BASE_STYLES, HELD_OUT_STYLES
from tools.style_bench import jitter
from tools.style_bench.discriminant import discriminant
from tools.style_bench.gates import GATED, Row, means, table
from tools.style_bench.imagenet import converted
from tools.style_bench.judges import WEIGHTS, Gallery, Judges, save
from tools.style_bench.networks import ConceptNet, Lite0, StyleNet
from tools.style_bench.panel import UNJUDGED, UNSEEN
from tools.style_bench.pictures import JUDGED_STYLES, EmojiPictures, lookalikes
from tools.style_bench.surface import COARSE, EVEN, LEVELS, SIZE, palette, shades, surface
from tools.style_bench.train_judges import CONCEPT_SPLITS, STYLE_SPLITS, pools
from tools.style_bench.verdict import answers, style_hits

LIMITS = {"style.safetensors": 5e6, "concept.safetensors": 10e6}


@pytest.fixture(scope="module")
def judges():
    torch.manual_seed(0)
    return Judges(StyleNet(len(JUDGED_STYLES) + 1), ConceptNet())


@pytest.fixture
def pictures(tmp_path):
    """Three concepts, two of them twins, as plain colours in three styles."""
    rows = [("aa", "red fox", "fox"), ("ab", "brown fox", "fox"), ("ac", "castle", "castle")]
    concepts = [
        {"code": code, "label": label, "tags": [], "group": "objects", "base": base, "split": "prompts"}
        for code, label, base in rows
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts), encoding="utf-8")
    colours = {"noto": (10, 20, 30), "twemoji": (12, 20, 30), "openmoji": (200, 90, 60)}
    for style, colour in colours.items():
        (tmp_path / "pictures" / style).mkdir(parents=True)
        for n, (code, _, _) in enumerate(rows):
            shade = [value + 10 * n for value in colour]
            Image.new("RGB", (128, 128), tuple(shade)).save(tmp_path / "pictures" / style / f"{code}.png")
    return EmojiPictures(tmp_path)


def test_what_the_judges_return(judges):
    views = torch.rand(2, 3, 128, 128)
    assert judges.styles == (*JUDGED_STYLES, "none")
    assert judges.style_logits(views).shape == (2, 13)
    assert torch.equal(judges.style_net.head(judges.style_features(views)), judges.style_logits(views))
    assert torch.allclose(judges.concept_embeddings(views).norm(dim=1), torch.ones(2))
    assert judges.style_logits(views[:0]).shape == (0, 13)
    assert judges.concept_embeddings(views[:0]).shape == judges.concept_embeddings(views)[:0].shape


def test_pictures_of_another_size_are_refused(judges):
    with pytest.raises(ValueError, match="resize"):
        judges.style_logits(torch.rand(1, 3, 64, 64))


def test_weights_survive_the_file(judges, tmp_path):
    save(judges.style_net, tmp_path / "style.safetensors", {"styles": ",".join(judges.styles)})
    save(judges.concept_net, tmp_path / "concept.safetensors", {})
    back = Judges.load(tmp_path)
    views = torch.rand(1, 3, 128, 128)
    assert back.styles == judges.styles
    assert torch.allclose(back.style_logits(views), judges.style_logits(views), atol=0.05)
    assert (back.concept_embeddings(views) * judges.concept_embeddings(views)).sum() > 0.999
    (tmp_path / "concept.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="train_judges"):
        Judges.load(tmp_path)


@pytest.mark.parametrize("name", LIMITS)
def test_shipped_weights_are_small(name):
    assert (WEIGHTS / name).stat().st_size <= LIMITS[name]


def test_shipped_judges_find_no_style_in_noise():
    rng = torch.Generator().manual_seed(0)
    views = torch.rand(2, 3, 128, 128, generator=rng)
    shipped = Judges.load()
    assert [shipped.styles[n] for n in shipped.style_logits(views).argmax(1)] == ["none", "none"]


def test_pictures_are_read_as_drawn(pictures):
    assert [concept.code for concept in pictures.of("noto", ["prompts"])] == ["aa", "ab", "ac"]
    assert not pictures.has("fxemoji", "aa") and not pictures.of("noto", ["learn"])
    assert (pictures.read("openmoji", "ab") == np.array([210, 100, 70])).all()
    assert torch.allclose(pictures.tensor("openmoji", ["ab"])[0, :, 0, 0], torch.tensor([210, 100, 70]) / 255)
    assert pictures.tensor("noto", []).shape == (0, 3, 128, 128)


def test_lookalikes_are_pairs_of_styles(pictures):
    assert lookalikes(pictures, ["prompts"]) == {(s, c) for s in ("noto", "twemoji") for c in ("aa", "ab", "ac")}
    assert lookalikes(pictures, ["test"]) == set()


def test_judges_learn_from_their_splits_and_not_from_lookalikes(pictures, tmp_path):
    rows = json.loads((tmp_path / "concepts.json").read_text())
    for row, split in zip(rows, ("learn", "validation", "prompts"), strict=True):
        row["split"] = split
    (tmp_path / "concepts.json").write_text(json.dumps(rows))
    there = EmojiPictures(tmp_path)
    style, concept = (pools(there, there, splits) for splits in (STYLE_SPLITS, CONCEPT_SPLITS))
    assert style["openmoji"].codes == ["aa", "ab"] and concept["openmoji"].codes == ["aa"]
    assert torch.equal(style["openmoji"].drawn, there.bytes("openmoji", ["aa", "ab"]))
    assert not style["noto"].codes  # as twemoji has the same
    assert not {*STYLE_SPLITS} & {*UNJUDGED} and not {*CONCEPT_SPLITS} & {*UNSEEN} and GATED in UNJUDGED


def test_the_gallery_never_looks_at_the_judged_style(judges, pictures):
    axes = {"aa": 0, "ab": 1, "ac": 2}
    asked = []

    def embed(style, codes):
        asked.append(style)
        return torch.stack([F.one_hot(torch.tensor(axes[code]), 4).float() for code in codes]) if codes else []

    gallery = Gallery(judges, pictures, "openmoji", embed=embed)
    assert "openmoji" not in asked and "noto" in asked and "fluent-modern" not in asked
    assert gallery.bases == ("fox", "fox", "castle")
    query = torch.tensor([[0.0, 1, 0, 0], [0.0, 0, 1, 0], [0.6, 0, 0.8, 0]])
    assert gallery.ranks(query, ["fox", "fox", "fox"]).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="no prototype of dragon"):
        gallery.ranks(query[:1], ["dragon"])
    with pytest.raises(ValueError, match="no style"):
        Gallery(judges, pictures, "fluent-modern")


def test_discriminant_ignores_what_varies_within_a_group():
    rng = torch.Generator().manual_seed(0)
    groups = torch.arange(8).repeat_interleave(20)
    centres = torch.randn(8, 2, generator=rng)
    features = torch.cat((centres[groups], 50 * torch.randn(160, 2, generator=rng)), 1)
    features[:, :2] += 0.01 * torch.randn(160, 2, generator=rng)
    weight, bias = discriminant(features, groups, 2, 1e-9)
    mapped = features @ weight.T + bias
    means = torch.stack([mapped[groups == n].mean(0) for n in range(8)])
    assert mapped.mean(0).abs().max() < 0.1
    assert (torch.cdist(mapped, means).argmin(1) == groups).float().mean() > 0.95


def test_imagenet_weights_fit_by_name_and_shape():
    ours = Lite0(16).state_dict()
    theirs = {"_fc.bias": torch.zeros(1), "_conv_head.weight": torch.zeros(1), "_bn1.bias": torch.zeros(1)}
    for key, value in ours.items():
        key = key.replace("stem.0", "_conv_stem").replace("stem.1", "_bn0").replace("blocks.", "_blocks.")
        for part, name in (("widen", ("_expand_conv", "_bn0")), ("depthwise", ("_depthwise_conv", "_bn1"))):
            key = key.replace(f"{part}.0", name[0]).replace(f"{part}.1", name[1])
        theirs[key.replace("narrow.0", "_project_conv").replace("narrow.1", "_bn2")] = value
    assert {key: value.shape for key, value in converted(theirs).items()} == {k: v.shape for k, v in ours.items()}


def test_jitter_keeps_shape_and_range():
    rng = torch.Generator().manual_seed(0)
    views = torch.rand(4, 3, 32, 32, generator=rng)
    moved = jitter.moved(views, rng, smallest=0.5, largest=0.6, turn=5, mirror=True)
    assert (
        (moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 1).any(dim=(1, 2)).all()
    )  # some corner shows the white outside
    for changed in (
        moved,
        jitter.recoloured(views, rng, 0.3),
        jitter.roughened(views, rng, blur=1, noise=0.1),
        jitter.spoiled(views, rng),
    ):
        assert changed.shape == views.shape and changed.min() >= 0 and changed.max() <= 1
    assert torch.allclose(jitter.recoloured(views, rng, 0), views, atol=1e-5)


def test_a_palette_is_the_share_of_each_colour():
    red = torch.tensor([1.0, 0, 0])[None, :, None, None].expand(1, 3, 12, 12)
    assert palette(red, 3).argmax() == 2 * 9 and palette(red, 3).sum() == 1
    between = palette(torch.full((1, 3, 12, 12), 0.25), 3)
    assert torch.allclose(between[between > 0], torch.tensor(8**-0.5))
    views = torch.rand(2, 3, 24, 24)
    assert torch.allclose(palette(views, 17).square().sum(1), torch.ones(2))


def parts(picture):
    """The four parts of a surface, as shares."""
    sizes = (LEVELS**3, LEVELS**3, COARSE**3)
    return surface(picture).square().tensor_split(torch.tensor(sizes).cumsum(0), 1)


def test_a_surface_tells_fills_outlines_and_shades_apart():
    plain = torch.full((1, 3, 64, 64), 0.5)
    lined = plain.clone()
    lined[:, :, :, 32:36] = 0  # a black line
    shaded = plain + torch.linspace(-0.3, 0.3, 64)
    for picture in (plain, lined, shaded):
        assert surface(picture).shape == (1, SIZE)
    (_, even, outline, shade), (_, lined_even, lined_outline, _), (_, _, _, soft) = map(parts, (plain, lined, shaded))
    assert even.sum() == 1 and outline.sum() == 0
    assert lined_outline.argmax() == 0 and lined_outline.sum() == pytest.approx(4 / 64)  # two sides of two pixels each
    assert lined_even.sum() == pytest.approx(1 - 4 / 64)
    assert shade.sum() == pytest.approx(4) and shade.max() == 1  # each scale has one class: no change
    assert EVEN > 0.6 / 63 and soft[0, :144].argmax() >= 12  # so soft a change is even, but is seen


def test_values_just_outside_their_range_are_counted_all_the_same():
    views = torch.tensor([-1e-6, 1 + 1e-6])[:, None, None, None].expand(2, 3, 64, 64)
    assert torch.allclose(surface(views), surface(views.clamp(0, 1)), atol=1e-2)


def test_shades_count_changes_over_each_distance():
    x = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    found = shades(x).square().reshape(4, 11, 12).sum(2)
    assert torch.allclose(found.sum(1), torch.ones(4), atol=1e-5)
    assert found.argmax(1).tolist() == [3, 4, 5, 7]  # 1/63, 2/63, 4/63, 8/63 between the bounds of STEPS


def test_a_style_judge_may_look_at_part_of_a_picture_but_counts_all_colours(judges):
    views = torch.rand(2, 3, 128, 128)
    net = judges.style_net
    assert torch.equal(net(views, views), net(views))
    other = views.clone()
    other[:, :, 64:] = 1  # changes the colours, not the part that is looked at
    assert not torch.equal(net(views, views[:, :, :64, :64]), net(other, views[:, :, :64, :64]))


def test_gates_count_each_answer_once():
    others = {"top-1": 0.9, "top-5": 1.0}
    good = Row("openmoji", 10, 9, {"style": 0.99, "own": 0.8, **others}, ())
    assert table("drawn", [good])[1]
    shares = {"style": 0.96, "own": 0.6, **others}
    bad = [Row(style, 10, 9, shares, (("noto", 1),)) for style in ("twemoji", "noto-v1", "fxemoji")]
    # To the first question three of four are "another"; to the second one is twemoji and three are "another".
    expected = {"style": 0.975, "own": (0.6 + (0.6 + 0.6 + 0.8) / 3) / 2, **others}
    assert means([good, *bad]) == pytest.approx(expected)  # three of four are below 0.97
    assert table("drawn", [good, *bad])[1]
    text, passed = table("drawn", bad)
    assert not passed and "FAIL" in text and "noto 1" in text


@pytest.mark.parametrize(
    ("logits", "held_out", "own"),
    [
        ({"openmoji": 2.0}, "openmoji", "another"),
        ({"noto": 3.0}, "another", "noto"),
        ({"noto": 4.0, "openmoji": 3.0}, "openmoji", "noto"),
        ({"noto": 4.0, "twemoji": 4.0, "fxemoji": 4.0, "openmoji": 2.5}, "another", "noto"),
        ({"noto": 3.0, "fxemoji": 4.0}, "another", "noto"),
        ({"noto": 2.0, "fxemoji": 6.0}, "another", "another"),
        ({"none": 9.0}, "another", "another"),
    ],
)
def test_another_style_is_one_answer_though_it_has_many_names(logits, held_out, own):
    names = (*JUDGED_STYLES, "none")
    row = torch.tensor([[logits.get(n, 0.0) for n in names]])
    asked = (*HELD_OUT_STYLES, *BASE_STYLES)
    hits, chances = style_hits(row.expand(len(asked), -1), names, asked)
    assert {style for style, hit in zip(asked, hits, strict=True) if hit} == {held_out, own} - {"another"}
    assert chances.min() > 0 and chances.max() < 1
    for among, answer in ((HELD_OUT_STYLES, held_out), (BASE_STYLES, own)):
        found = answers(row, names, among)[0]
        assert (*among, "another")[found.argmax()] == answer
        assert torch.allclose(found[:-1].exp(), chances[[asked.index(style) for style in among]])
        assert found.exp().sum() == pytest.approx(1)


def test_a_style_that_nothing_asks_for_is_refused():
    names = (*JUDGED_STYLES, "none")
    with pytest.raises(ValueError, match="'fxemoji' is neither held out nor a style of the base"):
        style_hits(torch.zeros(1, 13), names, ["fxemoji"])


def test_a_picture_that_says_nothing_is_not_another_style_for_that():
    names = (*JUDGED_STYLES, "none")
    assert answers(torch.zeros(1, 13), names, HELD_OUT_STYLES).exp().tolist() == [pytest.approx([0.2] * 5)]
