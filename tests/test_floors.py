"""Whether a sample metric can rank strategies, from its floor, its ceiling and its intervals."""

from __future__ import annotations

import pytest

from dit.analysis.floors import References, ranking

APART = {"zero": [20.0, 20.5, 19.5], "xavier": [30.0, 30.5, 29.5]}


def test_a_metric_that_separates_strategies_between_floor_and_ceiling_can_rank_them() -> None:
    found = ranking("Fréchet distance", APART, References(5, 10, 200), num_samples=5000, feature_dimension=1280)
    assert str(found) == "Fréchet distance can rank these strategies."


def test_the_small_default_study_cannot_be_ranked_and_every_reason_is_given() -> None:
    scores = {"zero": [450.0, 455.0, 454.0], "xavier": [455.0, 463.0, 459.0]}
    found = ranking("Fréchet distance", scores, References(296, 417, 538), num_samples=256, feature_dimension=1280)
    assert not found.possible
    assert "256 samples are fewer than the 1280 dimensions of the features" in str(found)
    assert "all strategies lie within 6" in str(found)


@pytest.mark.parametrize(
    ("references", "reason"),
    [
        (References(5, 10, 4), "grey images score 4, no worse than real training images at 5"),
        (References(5, 10, 25), "grey images score 25, no worse than xavier at 30"),
        (References(5, 21, 200), "zero scores 20, no worse than reconstructions by the autoencoder at 21"),
        (References(5, 18.5, 200), "zero is only 1.5 from reconstructions by the autoencoder"),
        (References(19, None, 200), "zero is only 1 from real training images"),
    ],
)
def test_references_that_a_metric_does_not_separate_forbid_a_ranking(references: References, reason: str) -> None:
    assert reason in str(ranking("kernel distance", APART, references, num_samples=256))


def test_grey_images_with_the_highest_precision_forbid_a_ranking() -> None:
    scores = {"zero": [0.5, 0.52, 0.48], "xavier": [0.3, 0.32, 0.28]}
    found = ranking("precision", scores, References(0.7, 0.6, 1.0), num_samples=256, lower_is_better=False)
    assert found.reasons == ("grey images score 1, no worse than real training images at 0.7",)


def test_two_seeds_are_too_few() -> None:
    found = ranking("kernel distance", {"zero": [20.0, 20.5], "xavier": [30.0, 31.0]}, References(5, 10, 200), num_samples=256)
    assert found.reasons == ("there are fewer than 3 seeds of zero, xavier",)
