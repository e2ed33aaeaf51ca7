import re
from pathlib import Path

import pytest
import torch

from kdfast.ops import huge_pages
from kdfast.ops.huge_pages import MIN_BYTES, new_large

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = 2 * MIN_BYTES


def flags_of_page(address):
    """Return the kernel's flags of the mapping with an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(not SETTING.exists(), reason="the system has no huge pages")
def test_only_large_tensors_ask_for_huge_pages():
    large = new_large(torch.empty(0), (LARGE // 4,))
    assert "hg" in flags_of_page(large.data_ptr() + LARGE // 2)
    other = torch.empty(LARGE // 4)
    assert "hg" not in flags_of_page(other.data_ptr() + LARGE // 2)


def test_small_tensors_do_not_ask(monkeypatch):
    # Their pages may have the flag all the same: NumPy asks for huge pages in memory that is used again.
    asked = []
    monkeypatch.setattr(huge_pages, "_advise", lambda: lambda *call: asked.append(call))
    new_large(torch.empty(0), (1000,))
    assert not asked
    new_large(torch.empty(0), (LARGE // 4,))
    assert len(asked) == 1


def test_shape_dtype_and_device_are_those_asked_for():
    tensor = new_large(torch.empty(0, dtype=torch.bfloat16), (LARGE // 2 // 16, 16))
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((LARGE // 32, 16), torch.bfloat16, True)
    assert new_large(tensor, (3,), torch.float64).dtype == torch.float64
    assert new_large(torch.empty(0, device="meta"), (LARGE,)).device.type == "meta"


def test_content_survives():
    tensor = new_large(torch.empty(0), (LARGE // 4,))
    tensor.copy_(torch.arange(LARGE // 4))
    assert torch.equal(tensor, torch.arange(LARGE // 4).float())
