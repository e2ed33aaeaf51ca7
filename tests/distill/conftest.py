"""Inputs of short runs on the digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization
from kdfast.distillation.config import RunConfig
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.targets import TeacherTargets
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TopK

# 101 samples: batches of 32, 32, 32 and 5. An odd number, so that rows of an epoch's index differ in their alignment.
IDS = np.arange(0, 303, 3, dtype=np.int64)


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("digits")


@pytest.fixture(scope="module")
def teacher(source: Source) -> Model:
    torch.manual_seed(5)
    net = build_net("resnet8", 10).eval()
    return Model(net, "resnet8", 10, tuple("0123456789"), compute_normalization(source.train), {})


@pytest.fixture(scope="module", params=[None, 3], ids=["all classes", "top 3"])
def cache(request: Any, source: Source, teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    out: Path = tmp_path_factory.mktemp("step") / "cache"
    build_cache(source, teacher, out, ids=IDS, n_views=4, top_k=None if request.param is None else TopK(3, 4.0))
    return TeacherCache.open(out)


@pytest.fixture(scope="module")
def make_plan(source: Source) -> Callable[..., Plan]:
    """Return a function that plans a run of 16 steps."""

    def make(teacher: TeacherTargets, device: str = "cpu", **settings: Any) -> Plan:
        loader = ResidentLoader(source.train, device)
        inputs = LoadedInputs(source, loader, compute_normalization(source.train), teacher)
        config = RunConfig("resnet8", epochs=4, batch_size=32, lr=0.1, schedule="cosine", **settings)
        return inputs.plan(config, IDS, device=torch.device(device))

    return make
