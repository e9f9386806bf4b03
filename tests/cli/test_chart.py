"""A chart in text."""

import pytest

from transxssm_cli.chart import chart


def test_points_lie_where_their_axes_say():
    lines = chart({"·": [(0, 5.0), (10, 3.0), (20, 1.0)], "o": [(20, 2.0)]}, width=11, height=5)
    assert lines == [
        "5.00 ┤·",
        "     ┤",
        "     ┤     ·",
        "     ┤          o",
        "1.00 ┤          ·",
        "     └───────────",
        "      0        20",
    ]


def test_later_series_cover_earlier_ones():
    assert chart({"·": [(1, 1.0)], "o": [(1, 1.0)]}, width=4, height=2)[0] == "1.00 ┤o"


def test_one_point_is_enough_and_none_is_not():
    assert "·" in "".join(chart({"·": [(7, 2.5)]}))
    with pytest.raises(ValueError, match="at least one point"):
        chart({"·": []})
