"""A cache records the views of an augmentation policy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.augment.presets import augment_source
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.data.views import view_table
from kdfast.distillation.targets import OnlineTargets
from kdfast.errors import CacheMismatch
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.verify import verify_cache

IDS = np.arange(5, 45, 5)


def test_a_cache_holds_the_logits_of_the_views_that_students_see(tmp_path: Path) -> None:
    plain = open_source("digits")
    source, _ = augment_source(plain, "trivial", 0)
    torch.manual_seed(0)
    teacher = Model(build_net("resnet8", 10).eval(), "resnet8", 10, tuple("0123456789"), compute_normalization(
        plain.train), {})  # fmt: skip
    build_cache(source, teacher, tmp_path / "cache", ids=IDS, n_views=4, dtype="float32")
    cache = TeacherCache.open(tmp_path / "cache", source=source)
    online = OnlineTargets(teacher, source.view_spec, torch.device("cpu"))
    images, ids = torch.from_numpy(source.train.read(IDS)), torch.from_numpy(IDS)
    table = view_table(source.view_spec, 0, IDS, 4)
    for index in range(4):
        expected = online.compute(images, None, torch.from_numpy(table[:, index].copy()), ids).logits
        torch.testing.assert_close(cache.lookup(IDS, np.full(len(IDS), index)), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cache.lookup(IDS, np.full(len(IDS), 0)), cache.lookup(IDS, np.full(len(IDS), 1)))

    with pytest.raises(CacheMismatch, match=r"changed by trivial \(256 views\), and this .* pass the `augment` that"):
        TeacherCache.open(tmp_path / "cache", source=plain)
    TeacherCache.open(tmp_path / "cache", source=plain, check_views=False)
    assert verify_cache(cache, plain, teacher, samples=8).passed
