"""Blocks cover every row once, in order, whatever the sizes."""

import pytest
import torch

from transxssm.ops.row_blocks import ELEMENTS_PER_BLOCK, row_blocks


@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 1), (7, 3), (5, ELEMENTS_PER_BLOCK), (3, ELEMENTS_PER_BLOCK + 1), (1000, 1000)], ids=str
)
def test_covers_every_row_once(shape):
    rows = torch.empty(shape, device="meta")
    covered = [index for block in row_blocks(rows) for index in range(*block.indices(shape[0]))]
    assert covered == list(range(shape[0]))


def test_a_block_fits_its_size_and_the_gpu_takes_one():
    rows = torch.empty(1000, 1000)
    assert max((block.stop - block.start) * 1000 for block in row_blocks(rows)) <= ELEMENTS_PER_BLOCK
    assert list(row_blocks(rows.to("meta"))) == [slice(0, 1000)]
