"""The demo's world: portraits are what their seeds and captions say."""

import random

import numpy as np
import pytest
from export.demo import captions, people, styles


def _levels(what: people.Portrait) -> np.ndarray:
    return np.asarray(styles.render(what), dtype=np.float32)


def test_a_seed_makes_one_portrait_and_one_picture() -> None:
    one, again = (people.portrait(random.Random(7)) for _ in range(2))
    assert one == again
    assert np.array_equal(_levels(one), _levels(again))
    assert one != people.portrait(random.Random(8))


@pytest.mark.parametrize("style", people.STYLES)
def test_a_style_shows_persons_and_differs_from_the_others(style: str) -> None:
    chance = random.Random(1)
    first, second = people.person(chance), people.person(chance)
    shown = [_levels(people.restyled(people.plain(who), style)) for who in (first, second)]
    assert shown[0].shape == (styles.SIDE, styles.SIDE, 3)
    assert np.abs(shown[0] - shown[1]).mean() > 2
    for other in set(people.STYLES) - {style}:
        assert np.abs(shown[0] - _levels(people.restyled(people.plain(first), other))).mean() > 2


def test_every_choice_can_be_drawn() -> None:
    chance = random.Random(2)
    seen = [people.portrait(chance) for _ in range(150)]
    for what in seen:
        styles.render(people.restyled(what, "flat poster"))
    for choices, found in (
        (people.HATS, {what.hat for what in seen}),
        (people.GLASSES, {what.glasses for what in seen}),
        (people.SCENES, {what.scene for what in seen}),
        (people.HAIR_STYLES, {what.person.hair for what in seen}),
        (people.BEARDS, {what.person.beard for what in seen}),
        (people.EXPRESSIONS, {what.expression for what in seen}),
    ):
        assert found == set(choices)


def test_captions_vary_and_say_nothing_that_is_not_there() -> None:
    chance = random.Random(3)
    for _ in range(300):
        what = people.portrait(chance)
        texts = {captions.caption(what, chance) for _ in range(8)}
        assert len(texts) > 3
        for text in texts:
            assert ("glasses" in text) <= (what.glasses != "none")
            assert ("tattoo" in text) <= (what.tattoo != "none")
            assert ("earrings" in text) <= (what.earrings != "none")
            assert ("man" in text.replace("woman", "")) <= (not what.person.woman)
            for scene in set(people.SCENES) - {what.scene}:
                assert scene not in text
