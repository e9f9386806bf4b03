"""Row blocks for elementwise work: what a block forms on its way stays in the cache, and no tensor is raised to float32 whole."""

from collections.abc import Iterator

from torch import Tensor

ELEMENTS_PER_BLOCK = 2**18  # 1 MiB of float32


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices over the first axis of (n, d), of about 2^18 elements; on a GPU, which gains nothing from blocks, a single one."""
    num_rows, width = rows.shape
    step = num_rows if rows.device.type != "cpu" else max(1, ELEMENTS_PER_BLOCK // max(width, 1))
    for start in range(0, num_rows, max(step, 1)):
        yield slice(start, min(start + step, num_rows))
