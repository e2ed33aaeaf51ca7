"""The terms of a run as one module, and what they need of the two networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kdfast.distillation.losses.base import BatchSamples, Outputs, RunSamples, SampleTerm, TapShapes, Term
from kdfast.distillation.losses.settings import TermSetting
from kdfast.errors import UsageError
from kdfast.nets.taps import TapRecorder, default_places

Places = Mapping[str, str]
# Images in a pass that finds the shapes of taps: more than one, to tell the axis of the batch.
PROBES = 2


class LossTerms(nn.Module):
    """All terms of a run, with their trained parameters.

    Args:
        settings: The terms.
        shapes: Shapes of the taps of both networks.
        samples: The samples of the run.
    """

    def __init__(self, settings: Sequence[TermSetting], shapes: TapShapes, samples: RunSamples) -> None:
        super().__init__()
        self.settings = tuple(settings)
        self.terms = nn.ModuleDict({s.name: s.entry.build(shapes, dict(s.options)) for s in settings})
        for term in self.terms.values():
            if isinstance(term, SampleTerm):
                term.set_samples(samples)

    def forward(
        self, student: Outputs, teacher: Outputs, labels: Tensor, batch: BatchSamples, *, initial: bool
    ) -> Tensor:
        """Return the weighted sum of the terms that count in a phase; 0 if none does.

        Args:
            student: The student's outputs.
            teacher: The teacher's, without gradient.
            labels: int64 (B,).
            batch: Which samples these are.
            initial: Whether this is the initial phase, in which some terms train alone.
        """
        total = student.logits.new_zeros(())
        for setting in self.settings:
            term = cast(Term, self.terms[setting.name])
            if initial and setting.entry.prepares:
                total = total + term.preparation(teacher)
            elif initial == setting.entry.initial:
                own = (batch,) if isinstance(term, SampleTerm) else ()
                given = (student, teacher, labels)
                if setting.entry.relates:
                    given = _of_all_processes(*given, setting.entry.taps, batch)
                total = total + setting.weight * term(*given, *own)
        return total

    def parameter_groups(self) -> list[dict[str, object]]:
        """Return the terms' parameters as groups of an optimizer, without the empty ones."""
        free = [p for term in self.terms.values() for p in cast(Term, term).parameters_without_decay()]
        unlike = {id(p) for p in free}
        decayed = [p for p in self.parameters() if id(p) not in unlike]
        groups: list[dict[str, object]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]


def _of_all_processes(
    student: Outputs, teacher: Outputs, labels: Tensor, taps: tuple[str, ...], batch: BatchSamples
) -> tuple[Outputs, Outputs, Tensor]:
    """Return the outputs and the labels of the whole batch, of which each process has a part."""

    def gather(outputs: Outputs) -> Outputs:
        return Outputs(batch.gather(outputs.logits), {name: batch.gather(outputs.taps[name]) for name in taps})

    return gather(student), gather(teacher), batch.gather(labels)


def required_taps(settings: Sequence[TermSetting]) -> tuple[str, ...]:
    """Return the names of the taps that the terms read."""
    return tuple(dict.fromkeys(tap for setting in settings for tap in setting.entry.taps))


def choose_places(net: nn.Module, taps: Sequence[str], given: Places, side: str) -> dict[str, str]:
    """Return where to read the taps in a network.

    Args:
        net: The network.
        taps: Names of the taps.
        given: Places that replace the default ones.
        side: `student` or `teacher`, for messages.

    Raises:
        UsageError: A tap has no place; the message says how to name one.
    """
    places = {**default_places(net), **given}
    missing = [tap for tap in taps if tap not in places]
    if missing:
        raise UsageError(
            f"a term reads the {side}'s {missing[0]}, and {type(net).__name__} has no default for it: name a module "
            f"with `tap` {side}.{missing[0]}=MODULE"
        )
    return {tap: places[tap] for tap in taps}


@torch.no_grad()
def probe_shapes(net: nn.Module, places: Places, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tap, without the batch axis, from a pass over blank images.

    Args:
        net: The network; its mode and its buffers are left as they are.
        places: The place of each tap.
        size: Height and width of the images.

    Raises:
        UsageError: A module does not run in a pass, or its activations have no axis of the batch's size.
    """
    mode = net.training
    device = next(net.parameters()).device
    with TapRecorder(net.eval(), places) as recorder:
        net(torch.zeros(PROBES, 3, *size, device=device))
    net.train(mode)
    taken = recorder.take()
    for name, place in places.items():
        if name not in taken:
            raise UsageError(f"`tap`: {type(net).__name__} has {place!r}, but does not call it: choose another module")
        if taken[name].shape[:1] != (PROBES,):
            raise UsageError(
                f"`tap`: {place!r} of {type(net).__name__} has shape {tuple(taken[name].shape)} for a batch of "
                f"{PROBES} images: choose a module with one activation for each image"
            )
    return {name: tuple(x.shape[1:]) for name, x in taken.items()}


def check_shapes(settings: Sequence[TermSetting], shapes: TapShapes) -> None:
    """Check that the taps have the axes that the terms need.

    Args:
        settings: The terms.
        shapes: Shapes of the taps of both networks.

    Raises:
        UsageError: One has not; the message says how to name another module.
    """
    for setting in settings:
        for name in setting.entry.taps if setting.entry.axes else ():
            axes = ("features",) if name == "pooled" else ("channels", "height", "width")
            for side, shape in (("student", shapes.student[name]), ("teacher", shapes.teacher[name])):
                if len(shape) != len(axes):
                    raise UsageError(
                        f"the term {setting.name} reads {name} as ({', '.join(axes)}), and the {side}'s has shape "
                        f"{shape}: name another module with `tap` {side}.{name}=MODULE"
                    )


@torch.no_grad()
def check_single_sample(terms: LossTerms, shapes: TapShapes) -> None:
    """Check that adapters can train on a single sample: batch norm needs two values for each channel.

    Args:
        terms: The terms.
        shapes: Shapes of the taps of both networks.

    Raises:
        UsageError: A term cannot.
    """
    student, teacher = (
        Outputs(torch.zeros(1, 1), {name: torch.zeros(1, *shape) for name, shape in side.items()})
        for side in (shapes.student, shapes.teacher)
    )
    for setting in terms.settings:
        term = cast(Term, terms.terms[setting.name])
        if isinstance(term, SampleTerm) or next(term.parameters(), None) is None:
            continue
        try:
            term(student, teacher, torch.zeros(1, dtype=torch.int64))
            if setting.entry.prepares:
                term.preparation(teacher)
        except ValueError as error:
            raise UsageError(
                f"the last batch of an epoch has a single sample, and the term {setting.name} cannot train "
                f"on one ({error}): choose another `batch_size`"
            ) from error
