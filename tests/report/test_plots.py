"""The figures: round ticks, no spike lost, and every drawn number equal to the record."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schoolhouse.report import plots, words
from schoolhouse.report.plots import Axis, Frame, Series

POINTS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4000).map(lambda ys: list(enumerate(ys)))


@given(POINTS, st.sampled_from([10, 100, 1000]))
def test_downsampling_keeps_the_order_the_extremes_and_the_limit(points: list[plots.Point], most: int) -> None:
    kept = plots.downsample(points, most)
    assert len(kept) <= max(most, 0) or len(points) <= most
    assert [x for x, _ in kept] == sorted({x for x, _ in kept}) and set(kept) <= set(points)
    assert {max(y for _, y in kept), min(y for _, y in kept)} == {max(y for _, y in points), min(y for _, y in points)}


def test_downsampling_finds_a_single_spike_in_a_million_steps() -> None:
    points = [(step, 1.0) for step in range(1_000_000)]
    points[123_457] = (123_457, 9.0)
    kept = plots.downsample(points)
    assert len(kept) <= 1000 and (123_457, 9.0) in kept


def test_smoothing_has_no_bias_to_the_beginning() -> None:
    assert plots.smooth([(step, 3.0) for step in range(50)], 10) == [(step, pytest.approx(3.0)) for step in range(50)]
    first, second = plots.smooth([(0, 0.0), (1, 1.0)], 1)
    assert first[1] == 0 and second[1] == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 600, [0, 100, 200, 300, 400, 500, 600]),
        (1, 12, [2, 4, 6, 8, 10, 12]),
        (-0.3, 0.3, [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]),
        (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert plots.ticks(low, high) == pytest.approx(expected)


def test_a_logarithmic_axis_has_powers_of_ten() -> None:
    axis = Axis(0.02, 4, 100, 0, log=True)
    assert axis.ticks() == [0.03, 0.1, 0.3, 1.0, 3.0]
    assert axis.at(0.02) == pytest.approx(100) and axis.at(4) == pytest.approx(0)


@example(999500021760.0)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_compact_number_is_short_and_right_to_three_digits(value: float) -> None:
    text = plots.compact(value)
    number = float(re.sub("[kMG]$", lambda found: {"k": "e3", "M": "e6", "G": "e9"}[found[0]], text))
    assert len(text) <= 10 and number == pytest.approx(value, rel=5.1e-3)


def test_numbers_in_words() -> None:
    assert [plots.compact(x) for x in (0, 0.5, 1234, 12_345, 3_412_992, 1e-5)] == [
        "0", "0.5", "1234", "12.3k", "3.41M", "1e-5"
    ]  # fmt: skip
    assert [words.duration(x) for x in (0.25, 42, 142.7, 3599.8, 11_100, 400_000)] == [
        "0.2 s", "42 s", "2 min 23 s", "1 h 00 min", "3 h 05 min", "4 d 15 h"
    ]  # fmt: skip
    assert plots.percent(0.94) == "94.0 %" and words.count(7473) == "7,473" and words.count(None) == "–"


def test_the_wilson_interval_is_the_published_one() -> None:
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for correct, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                      (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert words.wilson(correct, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_a_small_figure_is_drawn_as_expected() -> None:
    figure = plots.curves("Loss", [Series("each step", ((1, 4.0), (2, 2.0), (3, 3.0)))], Frame(1, 3))
    assert 'role="img" aria-label="Loss"' in figure
    [line] = re.findall(r'<polyline points="([^"]+)" class="curve main">', figure)
    # x: 50 to 390 over steps 1 to 3; y: 184 to 12 over 2 - 6 % to 4 + 6 % of the span of 2
    assert [tuple(map(float, point.split(","))) for point in line.split()] == [
        (50, pytest.approx(21.2, abs=0.06)), (220, pytest.approx(174.8, abs=0.06)), (390, pytest.approx(98, abs=0.06))
    ]  # fmt: skip
    assert re.findall("<title>([^<]+)</title>", figure) == [
        "step 1\neach step 4", "step 2\neach step 2", "step 3\neach step 3"
    ]  # fmt: skip


@pytest.mark.parametrize("points", [[(5, 0.0)], [(5, 2.0)], [(0, 1.0), (1, 1.0)], [(0, -1.0), (1, 1.0)],
                                    [(0, 1e-9), (1, 1e9)], [(0, 1e300), (9, 2e300)]])  # fmt: skip
def test_any_range_is_drawn_inside_the_figure(points: list[plots.Point]) -> None:
    figure = plots.curves("x", [Series("x", tuple(points))], Frame(points[0][0], points[-1][0]))
    places = [place.split(",") for line in re.findall(r'points="([^"]+)"', figure) for place in line.split()]
    assert places and all(50 <= float(x) <= 390 and 12 <= float(y) <= 184 for x, y in places)


def test_bars_stand_for_their_counts() -> None:
    figure = plots.bars("lengths", [0, 16, 32], [2, 4], "examples")
    assert re.findall("<title>([^<]+)</title>", figure) == ["0 to 16 tokens: 2 examples", "16 to 32 tokens: 4 examples"]
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" class="bar"', figure)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.11)  # a coordinate has one decimal
