import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from kdfast.data.augment.policies import OPERATIONS, apply_operations, parse_policy
from kdfast.data.augment.presets import augment_source, describe_views
from kdfast.data.readers.registry import open_source
from kdfast.data.stateless_random import hash64
from kdfast.data.views import Normalization, ViewSpec, apply_views, view_table
from kdfast.errors import UsageError

NAMES = list(OPERATIONS)
KEYS = hash64(3, np.arange(60_000))
PIXELS = Normalization((0, 0, 0), (1, 1, 1))
SHIFT = ViewSpec("shift", (12, 10), pad=2, flip=True, crops=9, seed=4, policy="trivial")
CROP = ViewSpec("crop", (12, 10), flip=True, crops=9, seed=4, policy="randaugment:n=2,m=9")


def by_operation(text: str, sides: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the distinct values that a policy draws for each operation."""
    policy = parse_policy(text)
    assert policy is not None
    chosen, values = policy.draw(KEYS, sides)
    return {name: np.unique(values[chosen == NAMES.index(name)].round(12)) for name in NAMES}


@pytest.mark.parametrize(("text", "count"), [("trivial", 1), ("randaugment:n=3,m=5", 3)])
def test_operations_are_drawn_uniformly_and_with_repetition(text: str, count: int) -> None:
    policy = parse_policy(text)
    assert policy is not None
    chosen, _ = policy.draw(KEYS, (32, 32))
    assert chosen.shape == (len(KEYS), count)
    for column in chosen.T:
        assert stats.chisquare(np.bincount(column, minlength=len(NAMES))).pvalue > 1e-4
    if count == 3:
        assert np.mean(chosen[:, 0] == chosen[:, 1]) == pytest.approx(1 / 14, abs=0.01)


def test_trivial_augment_has_the_wide_ranges_of_its_paper() -> None:
    found = by_operation("trivial", (32, 32))
    steps = np.arange(31)
    factors = 0.01 + 1.99 * steps / 30
    for name in ("color", "contrast", "brightness", "sharpness"):
        np.testing.assert_allclose(found[name], factors)
    np.testing.assert_allclose(found["rotate"], np.arange(-30, 31) * 4.5)
    np.testing.assert_allclose(found["shear-x"], np.arange(-30, 31) * 0.033)
    assert set(found["translate-y"]) == {sign * math.trunc(32 * s / 30) for s in steps for sign in (1, -1)}
    assert set(found["posterize"]) == {8 - 6 * s // 30 for s in steps}
    assert set(found["solarize"]) == {256 - 256 * s // 30 for s in steps}


def test_rand_augment_has_the_ranges_of_auto_augment() -> None:
    found = by_operation("randaugment:n=1,m=9", (331, 200))
    assert found["color"].tolist() == found["sharpness"].tolist() == pytest.approx([0.1 + 1.8 * 0.9])
    assert found["rotate"].tolist() == pytest.approx([-27, 27])
    assert found["shear-y"].tolist() == pytest.approx([-0.27, 0.27])
    assert found["translate-y"].tolist() == [-135, 135]
    assert found["translate-x"].tolist() == [-82, 82]  # 0.9 * 150 / 331 of 200 pixels, rounded
    assert (found["posterize"].tolist(), found["solarize"].tolist()) == ([5], [26])
    beyond = by_operation("randaugment:n=1,m=30", (8, 8))
    assert (beyond["posterize"].tolist(), beyond["solarize"].tolist()) == ([1], [0])


def test_no_magnitude_changes_nothing() -> None:
    found = by_operation("randaugment:n=1,m=0", (8, 8))
    assert {name: found[name].tolist() for name in ("rotate", "shear-x", "translate-x", "posterize", "solarize")} == {
        "rotate": [0], "shear-x": [0], "translate-x": [0], "posterize": [8], "solarize": [256],
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["randaugment:", "randaugment:n=0", "randaugment:m=31", "randaugment:n=2,n=3", "randaugment:k=1",
             "randaugment:m=2.5"],
)  # fmt: skip
def test_rejects_other_settings(text: str) -> None:
    with pytest.raises(UsageError, match="`augment` is"):
        parse_policy(text)


def test_policies_are_written_as_they_are_read() -> None:
    assert [str(parse_policy(text)) for text in ("trivial", "randaugment", "randaugment:m=4")] == [
        "trivial", "randaugment:n=2,m=9", "randaugment:n=2,m=4",
    ]  # fmt: skip
    assert parse_policy("cifar") is None
    assert parse_policy("trivial:n=1") is None


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 12, 10, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("spec", [SHIFT, CROP])
def test_views_depend_on_the_sample_and_not_on_the_batch(spec: ViewSpec) -> None:
    pixels, ids, views = images(12), np.arange(12) * 1000, np.arange(12) % 9
    whole = apply_views(pixels, views, spec, PIXELS, sample_ids=ids)
    table = torch.cat([images(3), pixels])
    rows = torch.arange(12) + 3
    assert torch.equal(apply_views(table, views, spec, PIXELS, sample_ids=ids, rows=rows), whole)
    for i in range(12):
        one = apply_views(pixels[i : i + 1], views[i : i + 1], spec, PIXELS, sample_ids=ids[i : i + 1])
        assert torch.equal(one[0], whole[i])
    other = apply_views(pixels, views, dataclasses.replace(spec, seed=5), PIXELS, sample_ids=ids)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("spec", [SHIFT, CROP])
def test_view_zero_is_the_image_itself(spec: ViewSpec) -> None:
    pixels = images(5)
    plain = dataclasses.replace(spec, policy=None, crops=9 if spec.kind == "crop" else 1)
    expected = apply_views(pixels, np.full(5, plain.identity), plain, PIXELS, sample_ids=np.arange(5))
    found = apply_views(pixels, np.zeros(5, np.int64), spec, PIXELS, sample_ids=np.arange(5))
    assert spec.identity == 0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_operations_follow_the_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, ids = images(40), np.arange(40)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(
        "kdfast.data.views.apply.apply_operations",
        lambda base, chosen, values: given.append(base) or apply_operations(base, chosen, values),
    )
    apply_views(pixels, np.full(40, 3), SHIFT, PIXELS, sample_ids=ids)
    every = dataclasses.replace(SHIFT, policy=None, crops=1)
    seen = set()
    for i in range(40):
        views = apply_views(pixels[i].expand(50, -1, -1, -1).contiguous(), np.arange(50), every, PIXELS)
        shifted = (views * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        matches = [v for v in range(50) if torch.equal(shifted[v], given[0][i])]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 20


def test_specs_of_earlier_versions_have_no_policy() -> None:
    fields = dataclasses.replace(SHIFT, policy=None, crops=1).to_dict()
    assert "policy" not in fields
    assert ViewSpec.from_dict(fields).policy is None
    assert ViewSpec.from_dict(SHIFT.to_dict()) == SHIFT
    with pytest.raises(UsageError, match="`policy` of views is 'auto'"):
        ViewSpec("shift", (8, 8), policy="auto")


def test_named_augmentations() -> None:
    source = open_source("digits")
    assert augment_source(source, None, 5) == (source, 5)
    assert augment_source(source, "none", 0)[1] == 1
    found = {name: augment_source(source, name, 0)[0].view_spec for name in ("cifar", "imagenet", "trivial")}
    assert found["cifar"] == ViewSpec("shift", (8, 8), pad=4, flip=True)
    assert (found["imagenet"].kind, found["imagenet"].flip, found["imagenet"].scale) == ("crop", True, (0.08, 1.0))
    assert dataclasses.replace(found["trivial"], policy=None, crops=1) == source.view_spec
    assert len(view_table(found["trivial"], 0, np.arange(3), 7)[0]) == 7
    assert describe_views(found["trivial"]) == "padded by 1, cropped, then changed by trivial (256 views)"
    with pytest.raises(UsageError, match="did you mean 'cifar'"):
        augment_source(source, "cifra", 0)
    with pytest.raises(UsageError, match="has 1 view, and `views` is 3"):
        augment_source(source, "none", 3)
