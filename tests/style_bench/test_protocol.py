from collections import Counter
from dataclasses import replace

import pytest

from tools.pretrain_nano.concepts import Concept
from tools.style_bench import protocol


def concepts(count, split="learn", groups=("objects", "objects", "people")):
    return [
        Concept(f"{split}{i:04x}", f"{split} {i}", (), groups[i % len(groups)], f"{split} {i}", split)
        for i in range(count)
    ]


def everywhere(style, code):
    return True


def task(learn, prompts, subset=0, **changes):
    settings = {"images": 30, "half": "final", "prompts": 100, "seeds": 4} | changes
    return protocol.make_task([*learn, *prompts], everywhere, "openmoji", subset, **settings)


def test_nobody_learns_from_validation_pictures_and_subsets_differ():
    tasks = [task(concepts(120), concepts(40, "prompts"), subset) for subset in range(3)]
    first = {c.base for c in tasks[0].validation}
    for one in tasks:
        assert len(one.learn) == 30 and len(one.validation) == protocol.NUM_VALIDATION
        assert {c.base for c in one.validation} == first
        assert first.isdisjoint(c.base for c in (*one.learn, *one.everything))
        assert set(one.learn) <= set(one.everything)
    assert len({frozenset(one.learn) for one in tasks}) == 3


def test_the_choice_depends_on_names_and_not_on_their_order():
    learn, prompts = concepts(120), concepts(40, "prompts")
    assert set(task(learn, prompts).learn) == set(task(learn[::-1], prompts).learn)
    assert task(learn, prompts).prompts == task(learn, prompts[::-1]).prompts


def test_every_group_has_its_share():
    chosen = protocol.stratified(concepts(90), 30, "key")
    assert Counter(c.group for c in chosen) == {"objects": 20, "people": 10}
    assert len(protocol.stratified(concepts(90), 7, "key")) == 7


def test_too_few_pictures_are_an_error_that_says_how_many():
    with pytest.raises(ValueError, match=r"30 pictures are wanted.* has 5"):
        protocol.stratified(concepts(5), 30, "key")


def test_the_halves_share_no_prompt_and_lose_none():
    known = concepts(200, "prompts")
    halves = [protocol.choose_prompts(known, everywhere, "openmoji", half, 1000) for half in protocol.HALVES]
    assert not {c.base for c in halves[0]} & {c.base for c in halves[1]}
    assert sum(map(len, halves)) == 200
    assert all(80 < len(half) < 120 for half in halves)


def test_of_twins_the_best_known_is_drawn_and_those_with_a_real_picture_come_first():
    known = concepts(30, "prompts")
    twin = replace(known[0], code="twin", label="twin")
    half = protocol.half_of(twin.base)
    drawn = {known[4].code, twin.code}

    def has(style, code):
        return style != "openmoji" or code in drawn

    chosen = protocol.choose_prompts([*known, twin], has, "openmoji", half, 1000)
    assert twin in chosen and known[0] not in chosen
    assert chosen[0].code in drawn


def test_seeds_are_fixed_by_name():
    assert protocol.seed_of("castle", 0) == protocol.seed_of("castle", 0) < 2**32
    assert len({protocol.seed_of(base, k) for base in ("castle", "cat") for k in range(4)}) == 8
