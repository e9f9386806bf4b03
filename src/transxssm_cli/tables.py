"""Tables of results in a terminal. In a file or a pipe they have their full width."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table


def table_of(headings: Sequence[str], rows: Iterable[Sequence[str]], *, num_names: int = 1) -> Table:
    """A table whose first `num_names` columns are left-aligned text without line breaks, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        is_name = index < num_names
        table.add_column(
            escape(heading),
            justify="left" if is_name else "right",
            no_wrap=is_name,
            overflow="ellipsis" if is_name else "fold",
        )
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def show(*parts: RenderableType, stderr: bool = False) -> None:
    """Prints tables and lines. Only in a terminal is a table wrapped to its width."""
    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        tables = [
            Measurement.get(console, console.options.update(width=10_000), part).maximum
            for part in parts
            if isinstance(part, Table)
        ]
        console = Console(highlight=False, stderr=stderr, width=max([console.width, *tables]))
    console.print(Group(*parts))
