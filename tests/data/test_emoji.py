import pytest
from emoji import choose, folder_name, list_emojis

CATALOGUE: list[dict[str, object]] = [
    {"category": category, "short_name": f"{category}-{index}".lower(), "image": f"{index}.png", "has_img_google": index != 0}
    for category in ("Flags", "Food & Drink", "Component")
    for index in range(21)
]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        pytest.param("People & Body", "people-and-body", id="category"),
        pytest.param("Flags", "flags", id="one word"),
        pytest.param("+1", "plus-1", id="thumbs up"),
        pytest.param("-1", "minus-1", id="thumbs down"),
        pytest.param("anatomical_heart", "anatomical_heart", id="underscore"),
    ],
)
def test_titles_become_folder_names(title: str, expected: str) -> None:
    assert folder_name(title) == expected


def test_undrawn_emojis_and_skin_tones_are_left_out() -> None:
    emojis = list_emojis(CATALOGUE, vendor="google")

    assert {emoji.category for emoji in emojis} == {"flags", "food-and-drink"}
    assert len(emojis) == 40


def test_subset_keeps_the_proportions_and_does_not_depend_on_the_order() -> None:
    emojis = list_emojis(CATALOGUE, vendor="google")

    subset = choose(emojis, limit=10)

    assert [emoji.category for emoji in subset].count("flags") == 5
    assert set(subset) == set(choose(emojis[::-1], limit=10))


def test_larger_subset_contains_the_smaller() -> None:
    emojis = list_emojis(CATALOGUE, vendor="google")

    assert set(choose(emojis, limit=10)) < set(choose(emojis, limit=20))


def test_no_limit_keeps_all() -> None:
    emojis = list_emojis(CATALOGUE, vendor="google")

    assert choose(emojis, limit=None) == emojis
