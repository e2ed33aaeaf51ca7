"""The set of views of a data set."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from kdfast.data.augment.policies import parse_policy
from kdfast.errors import DataError, UsageError

# Crops of version 1 were resized by PyTorch, in floating point, with bits that depended on the machine.
_VERSIONS = {"shift": 1, "crop": 2}


@dataclass(frozen=True)
class ViewSpec:
    """The set of views of a data set.

    Attributes:
        kind: "shift": crops of the zero-padded image at its own size; "crop": random resized crops.
        size: Height and width of a view, in pixels; for "shift", also of the images.
        pad: For "shift": black border on each side, in pixels.
        flip: Whether a view may be mirrored left to right.
        crops: For "crop" and with a policy: number of views per sample, including the identity.
        scale: For "crop": smallest and largest area of a box, as a fraction of the image's.
        ratio: For "crop": smallest and largest width / height of a box.
        seed: For "crop" and with a policy: seed of the boxes, shifts and operations.
        version: Version of the mapping from view ids to images; 0 is replaced by the current one.
        policy: Operations that follow the shift or crop in every view but the identity, as `parse_policy` reads them;
            None for none.
    """

    kind: Literal["shift", "crop"]
    size: tuple[int, int]
    pad: int = 0
    flip: bool = False
    crops: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0
    version: int = 0
    policy: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("shift", "crop"):
            raise UsageError(f"`kind` of views is {self.kind!r}: must be 'shift' or 'crop'")
        current = _VERSIONS[self.kind]
        if self.version == 0:
            object.__setattr__(self, "version", current)
        if self.version != current:
            raise DataError(
                f"{self.kind} views have version {self.version}; this kdfast needs version {current}: rebuild the cache"
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise UsageError(f"`size` of views is {self.size}: must be a positive height and width")
        if not 0 <= self.pad <= min(self.size):
            raise UsageError(f"`pad` is {self.pad}: must be 0 to {min(self.size)} for views of size {self.size}")
        if self.policy is not None and parse_policy(self.policy) is None:
            raise UsageError(f"`policy` of views is {self.policy!r}: must be 'randaugment' or 'trivial'")
        if self.crops < 1 or (not self.is_drawn and self.crops != 1) or (self.kind == "crop" and self.pad):
            raise UsageError(
                f"{self.kind} views with `pad` {self.pad}, `crops` {self.crops}: pad is for shift, crops for crop"
            )
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1] < math.inf):
            raise UsageError(
                f"`scale` is {self.scale}, `ratio` {self.ratio}: must have 0 < low <= high, and a scale of at most 1"
            )

    @property
    def count(self) -> int:
        """Number of view ids."""
        return self.crops if self.is_drawn else self.shifts

    @property
    def identity(self) -> int:
        """Id of the view that leaves the image unchanged (for "crop": the whole image, resized)."""
        return 0 if self.is_drawn else self.unshifted

    @property
    def is_drawn(self) -> bool:
        """Whether what a view id does is drawn for each sample, on the CPU, and not the same for all samples."""
        return self.kind == "crop" or self.policy is not None

    @property
    def has_boxes(self) -> bool:
        """Whether a view is a box of its image, which `view_boxes` draws ahead."""
        return self.kind == "crop" and self.policy is None

    @property
    def shifts(self) -> int:
        """Number of positions of a shift, mirrored ones included."""
        return (2 * self.pad + 1) ** 2 * (2 if self.flip else 1)

    @property
    def unshifted(self) -> int:
        """The shift, of `shifts`, that leaves the image unchanged."""
        return self.pad * (2 * self.pad + 2) * (2 if self.flip else 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; a policy only if there is one, as in files of earlier versions."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        if self.policy is None:
            del fields["policy"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ViewSpec:
        """Return the spec whose fields `to_dict` returned.

        Raises:
            DataError: A field is missing, unknown or invalid, or the version differs.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(fields) | {"policy"} != names:
            needed = sorted(names - {"policy"})
            raise DataError(f"view spec with fields {sorted(fields)}: needs exactly {needed}; rebuild the cache")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        try:
            return cls(**values)
        except (TypeError, UsageError) as exc:
            raise DataError(f"damaged view spec {fields}: {exc}") from exc
