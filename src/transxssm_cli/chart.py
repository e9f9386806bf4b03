"""A chart in text, for a terminal."""

from collections.abc import Mapping, Sequence

Point = tuple[float, float]


def chart(series: Mapping[str, Sequence[Point]], *, width: int = 64, height: int = 12) -> list[str]:
    """Lines of text that show points over common axes.

    Args:
        series: points (x, y) by the one character they are drawn with; later ones cover earlier ones.
        width, height: of the area for points, in characters.

    Raises:
        ValueError: there is no point.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("a chart needs at least one point: got none")
    (left, right), (bottom, top) = ((min(values), max(values)) for values in zip(*points, strict=True))
    rows = [[" "] * width for _ in range(height)]
    for mark, line in series.items():
        for x, y in line:
            column = _place(x, left, right, width)
            row = _place(y, top, bottom, height)
            rows[row][column] = mark
    labels = {0: f"{top:.2f}", height - 1: f"{bottom:.2f}"}
    margin = max(map(len, labels.values()))
    lines = [f"{labels.get(index, ''):>{margin}} ┤{''.join(row).rstrip()}" for index, row in enumerate(rows)]
    lines.append(f"{'':{margin}} └{'─' * width}")
    lines.append(f"{'':{margin}}  {left:<{width // 2},.0f}{right:>{width - width // 2},.0f}")
    return lines


def _place(value: float, first: float, last: float, size: int) -> int:
    """Index of the cell, among `size` from `first` to `last`, that a value falls into."""
    return round((value - first) / (last - first) * (size - 1)) if last != first else 0
