"""The tile shapes of the top-k kernel."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("classes", [1, 64, 65, 1000, 16384, 16385, 65536, 262144])
@pytest.mark.parametrize(("k", "itemsize", "align"), [(1, 2, 8), (64, 4, 1), (256, 2, 1), (5000, 4, 16)])
def test_tiles_cover_a_row_or_stream_it(classes, k, itemsize, align):
    from kdfast.ops.kd_loss.triton.topk import topk_shape

    shape = topk_shape(classes, k, itemsize, align)
    tile = shape["REPEAT"] * shape["WORDS"] * 64
    assert shape["SINGLE"] == (classes <= 16384)
    assert not shape["SINGLE"] or classes <= tile < 2 * max(64, classes)
    assert shape["K_BLOCK"] >= k
    assert shape["VECTOR"] * itemsize == 16
    assert 32 * shape["num_warps"] * shape["maxnreg"] <= 65536
