"""Named augmentations of a data set's training images, in place of its own."""

from __future__ import annotations

import dataclasses

from kdfast.data.augment.policies import parse_policy
from kdfast.data.source import Source
from kdfast.data.views import ViewSpec
from kdfast.errors import UsageError, did_you_mean

AUGMENTATIONS = ("none", "cifar", "imagenet", "randaugment", "trivial")

_CIFAR_PAD = 4
_CROPS = 128  # as many as of large images without a named augmentation
# A run of up to so many epochs sees no view twice; each costs a row in a cache.
_POLICY_VIEWS = 256


def augment_source(source: Source, name: str | None, views: int) -> tuple[Source, int]:
    """Return a source with a named augmentation, and the number of views per sample.

    `none` is the one unaugmented view; `cifar` a crop of the image padded by 4 black pixels, and a flip; `imagenet` a
    random resized crop and a flip; `randaugment` and `trivial` the source's own views, each followed by operations of
    that policy. The other two kinds flip too.

    Args:
        source: The data.
        name: One of `AUGMENTATIONS`, `randaugment` also with `:n=2,m=9`; None for the source's own.
        views: Views per sample, 0 for all.

    Raises:
        UsageError: There is no such augmentation, or it does not fit the images or the number of views.
    """
    if name is None:
        return source, views
    if name == "none":
        if views > 1:
            raise UsageError(f"`augment` is none, which has 1 view, and `views` is {views}: omit one of them")
        return source, 1
    return dataclasses.replace(source, view_spec=_named_spec(source, name)), views


def describe_views(spec: ViewSpec) -> str:
    """Return a set of views in words."""
    mirrored = " and mirrored" if spec.flip else ""
    if spec.kind == "crop":
        base = f"cut out at random positions and sizes{mirrored}"
    else:
        base = f"padded by {spec.pad}, cropped{mirrored}"
    policy = "" if spec.policy is None else f", then changed by {spec.policy}"
    return f"{base}{policy} ({spec.count} views)"


def _named_spec(source: Source, name: str) -> ViewSpec:
    size = source.train.shape[:2]
    policy = parse_policy(name)
    if policy is not None:
        return dataclasses.replace(source.view_spec, crops=_POLICY_VIEWS, policy=str(policy))
    if name == "cifar":
        if min(size) < _CIFAR_PAD:
            raise UsageError(f"`augment` is cifar, which pads by {_CIFAR_PAD} pixels; the images are {size}: omit it")
        return _cifar(size)
    if name == "imagenet":
        return _imagenet(size)
    raise UsageError(
        f"`augment` is {name!r}: {did_you_mean(name, AUGMENTATIONS)}pass one of {', '.join(AUGMENTATIONS)}"
    )


def _cifar(size: tuple[int, int]) -> ViewSpec:
    return ViewSpec(kind="shift", size=size, pad=_CIFAR_PAD, flip=True)


def _imagenet(size: tuple[int, int]) -> ViewSpec:
    return ViewSpec(kind="crop", size=size, flip=True, crops=_CROPS)
