"""The generated world: the same for the same numbers, rightly labelled, and disjoint between splits."""

from __future__ import annotations

import numpy as np
import pytest
from vtengine_training.glance import KINDS, SPLITS, Scene, guess, make_scene
from vtengine_training.glance.pages import make_page
from vtengine_training.glance.regions import region
from vtengine_training.glance.scene import COLOURS, LOW_READABLE, LOW_UNREADABLE, Query
from vtengine_training.glance.supervision import IGNORE, KEYS, SIZES, answer_tokens, patch_labels
from vtengine_training.glance.views import LIMITS, patches, plans, query_needs_high

from vtengine.vision.plan import PATCH, plan_crop

SCENES = [make_scene("validation", 5, index) for index in range(210)]


@pytest.mark.parametrize("index", [0, 1, 17])
def test_a_scene_is_a_function_of_its_number(index: int) -> None:
    one, two = make_scene("train", 3, index), make_scene("train", 3, index)
    assert np.array_equal(one.image, two.image)
    assert (one.glyphs, one.marks, one.queries) == (two.glyphs, two.marks, two.queries)


def test_splits_seeds_and_numbers_differ() -> None:
    images = {
        make_scene(split, seed, index).image.tobytes() for split in SPLITS for seed in (0, 1) for index in range(40)
    }
    assert len(images) == len(SPLITS) * 2 * 40


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_and_can_be_asked_for(kind: str) -> None:
    assert any(scene.kind == kind for scene in SCENES)
    assert make_scene("test", 0, 0, kind).kind == kind


@pytest.mark.parametrize(
    ("split", "seed", "kind", "named"),
    [("dev", 0, None, "split"), ("train", -1, None, "seed"), ("train", 0, "photo", "kind")],
)
def test_bad_arguments_are_named(split: str, seed: int, kind: str | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_scene(split, seed, 0, kind)


def cap_in_low_view(scene: Scene, query: Query) -> float | None:
    if query.cap is None:
        return None
    low, _ = plans(scene)
    height, width = scene.image.shape[:2]
    return query.cap * min(low.height / height, low.width / width)


def test_labels_follow_the_cap_height_and_nothing_lies_in_the_gap() -> None:
    seen = set()
    for scene in SCENES:
        for query in scene.queries:
            cap = cap_in_low_view(scene, query)
            assert cap is None or cap <= LOW_UNREADABLE or cap >= LOW_READABLE
            assert query_needs_high(scene, query) == (cap is not None and cap <= LOW_UNREADABLE)
            seen.add((scene.kind, query_needs_high(scene, query)))
    assert {kind for kind, needs in seen if needs} == set(KINDS)
    assert {kind for kind, needs in seen if not needs} == set(KINDS)


def test_cap_heights_are_those_of_the_drawn_letters() -> None:
    for scene in SCENES:
        for glyph in scene.glyphs:
            if glyph.char in "EHX":
                assert abs(glyph.h - glyph.cap) <= 1, (scene.kind, glyph)


def test_text_answers_can_be_read_off_the_layout() -> None:
    for scene in SCENES:
        for query in scene.queries:
            if query.key and query.form and not query.question.startswith("How"):
                field = sorted((g for g in scene.glyphs if g.key == query.key), key=lambda g: g.slot)
                assert "".join(glyph.char for glyph in field) == query.answer, (scene.kind, query)
                assert {glyph.cap for glyph in field} == {query.cap}


def test_drawing_answers_can_be_read_off_the_marks() -> None:
    for scene in SCENES:
        for query in scene.queries:
            words = query.question.rstrip("?").split()
            if query.question.startswith("How many"):
                assert query.answer == str(sum(mark.shape + "s" == words[2] for mark in scene.marks))
            elif query.question.startswith("What colour is the"):
                assert [mark.colour for mark in scene.marks if mark.shape == words[4]] == [query.answer]
            elif query.question.startswith("Which bar"):
                tallest = max(range(len(scene.marks)), key=lambda i: scene.marks[i].h)
                assert query.answer == "ABCDE"[tallest]


def test_everything_lies_inside_the_picture_and_glyphs_do_not_overlap() -> None:
    for scene in SCENES:
        height, width = scene.image.shape[:2]
        assert 100 <= height <= 230 and 100 <= width <= 286
        taken = np.zeros((height, width), bool)
        for glyph in scene.glyphs:
            assert glyph.x >= 0 and glyph.x + glyph.w <= width and glyph.y >= 0 and glyph.y + glyph.h <= height
            middle = (slice(glyph.y + 1, glyph.y + glyph.h - 1), slice(glyph.x + 1, glyph.x + glyph.w - 1))
            taken[middle] = True
    assert {"red", "green"} <= set(COLOURS)


def test_views_stay_within_the_limits_and_low_is_a_quarter() -> None:
    for scene in SCENES:
        low, high = plans(scene)
        assert 4 <= low.visual_tokens <= 20 and 16 <= high.visual_tokens <= 80
        assert high.height * high.width <= LIMITS.max_pixels
        assert 4 * low.visual_tokens == high.visual_tokens
        assert patches(scene, low).shape == (4 * low.visual_tokens, 588)


def test_dense_labels_name_every_legible_glyph() -> None:
    for scene in SCENES:
        for plan in plans(scene):
            labels = patch_labels(scene, plan).stack()
            assert labels.shape == (plan.visual_tokens * 4, 4)
            for column, size in enumerate(SIZES.values()):
                assert labels[:, column].max() < size
                assert ((labels[:, column] >= 0) | (labels[:, column] == IGNORE)).all()
        keys = {glyph.key for glyph in scene.glyphs}
        assert keys <= set(KEYS)
        assert {KEYS.index(key) + 1 for key in keys} <= set(labels[:, 1].tolist())  # the high view shows all


def test_answers_are_located_where_they_are_legible() -> None:
    for scene in SCENES:
        low, high = plans(scene)
        for plan in (low, high):
            labels = patch_labels(scene, plan).stack()
            for query in scene.queries:
                shown = answer_tokens(scene, plan, labels, query)
                if plan is high or (not query_needs_high(scene, query) and query.mark < 0):
                    assert all(len(tokens) for tokens in shown), (scene.kind, query)
                assert all(0 <= token < plan.visual_tokens for tokens in shown for token in tokens)


@pytest.mark.parametrize("number", range(4))
def test_pages_are_dense_and_ask_nothing(number: int) -> None:
    page = make_page(0, number)
    assert not page.queries and len(page.glyphs) >= 40
    labels = patch_labels(page, plans(page)[page.image.shape[0] < 200]).stack()
    assert (labels[:, 0] > 0).sum() >= 40 and (labels[:, 1] <= 0).all()
    assert np.array_equal(page.image, make_page(0, number).image)


@pytest.mark.parametrize("scene", SCENES[:40], ids=lambda scene: scene.kind)
def test_a_guess_has_the_form_of_an_answer(scene: Scene) -> None:
    rng = np.random.default_rng(0)
    for query in scene.queries:
        made = guess(rng, query)
        if "|" in query.form:
            assert made in query.form.split("|") and query.answer in query.form.split("|")
        else:
            assert [c.isdigit() for c in made] == [c.isdigit() for c in query.answer]


def test_a_region_holds_all_that_is_too_small_and_costs_less_than_the_whole() -> None:
    """In the pixels of the low view, from patch to patch."""
    costs = []
    for scene in SCENES:
        low, high = plans(scene)
        height, width = scene.image.shape[:2]
        for query in (query for query in scene.queries if query_needs_high(scene, query)):
            left, top, right, bottom = region(scene, query, low)
            assert 0 <= left < right <= low.width and 0 <= top < bottom <= low.height
            assert all(edge % PATCH == 0 or edge in (low.width, low.height) for edge in (left, top, right, bottom))
            for glyph in (glyph for glyph in scene.glyphs if glyph.cap == query.cap):
                x, y = glyph.x * low.width / width, glyph.y * low.height / height
                assert left <= x and x + glyph.w * low.width / width <= right
                assert top <= y and y + glyph.h * low.height / height <= bottom
            crop = plan_crop(width, height, low, (left, top, right, bottom), LIMITS)
            costs.append((crop.visual_tokens, high.visual_tokens))
    assert all(part <= whole for part, whole in costs)
    assert sum(part for part, _ in costs) < 0.9 * sum(whole for _, whole in costs)
