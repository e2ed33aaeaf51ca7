"""Validated arguments of a ``kd_loss`` call, passed as one object."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.errors import ShapeError

__all__ = ["ALPHA_RANGE", "MAX_T", "MIN_T", "T_RANGE", "KDCall", "TopKTeacher"]

MIN_T, MAX_T = 1e-15, 1e15
"""Temperatures for which 1 / T and T^2 are representable in float32."""

# What a message says about alpha or a temperature that is out of range.
ALPHA_RANGE = "must be in [0, 1], the weight of the divergence"
T_RANGE = f"must be a positive number, from {MIN_T:g} to {MAX_T:g}"


class TopKTeacher(NamedTuple):
    """The k most probable classes of a teacher in each of M rows.

    A row may hold fewer than k classes: an entry whose value is -inf is left out, whichever class it names, and that
    class counts as one of the tail. ``torch.save`` writes it, and ``torch.load`` reads it with its default,
    ``weights_only=True``, in a process that has imported this class (``from kdfast import TopKTeacher``).

    Attributes:
        values: (M, k) raw logits of those classes, floating point.
        classes: (M, k) class ids, in any order, distinct within a row except those of entries that are left out; int32,
            or int64, which each call of the loss converts.
        tail: (M,) log of the sum of exp(t / T) over the classes left out, at the temperature T of the loss; -inf if
            none is left out.
    """

    values: Tensor
    classes: Tensor
    tail: Tensor

    @classmethod
    def from_logprobs(
        cls,
        values: Any,
        ids: Any,
        temperature: float,
        *,
        classes: int | None = None,
        offsets: Any | None = None,
        top_k: int | None = None,
        logprob_temperature: float = 1.0,
        tail: bool = True,
    ) -> TopKTeacher:
        """Make a teacher of stored log-probabilities, as inference servers return them.

        The kept classes are exact at every temperature. The tail is exact if ``temperature`` is the one of the
        log-probabilities, 1 for those of vLLM and SGLang: the mass of the other classes is 1 minus that of the kept
        ones. At another temperature, the sum of p^(1/T) over the other classes also depends on how they share that
        mass. It is then estimated by a power law of the rank that has their mass and continues below the last of the
        ``top_k`` classes. ``kdfast.ops.kd_loss.offline.tempered_tail`` returns the estimate with its bounds, the least
        and the largest value that agree with the stored numbers.

        Args:
            values: (M, k) natural log-probabilities over all classes, floating point, an array or a tensor; -inf for
                entries to leave out. With ``offsets``: (E,).
            ids: (M, k) or (E,) their classes, integers. Of a class that is repeated in a row, the first entry counts,
                so the token that was drawn may be among them twice.
            temperature: The T of the loss.
            classes: Number of all classes, the size of the vocabulary; needed unless the tail is exact.
            offsets: (M + 1,): row i holds the entries from ``offsets[i]`` to ``offsets[i + 1]``, for rows of different
                lengths, such as top-p sets.
            top_k: How many entries of each row are the most probable classes; the others may be any, such as the token
                that was drawn. Only the estimate uses it. None: all of them; 0: not known.
            logprob_temperature: What the logits were divided by before the softmax.
            tail: False divides by the mass of the kept classes instead, as some trainers do. This is biased: the
                student learns that all other classes are impossible.

        Returns:
            The teacher, (M, k). Mass below 2^-24 of the other classes counts as 2^-24, unless all classes are kept. A
            row without entries adds nothing to the loss.

        Raises:
            ShapeError: If shapes do not fit, a value is no log-probability, a row has more mass than 1, or the mass of
                the other classes is more than they can have.
            IndexError: If a class is negative or not below ``classes``.
            TypeError: If the values are no floating-point numbers.
        """
        from kdfast.ops.kd_loss.offline import from_logprobs

        return from_logprobs(
            values, ids, temperature, classes=classes, offsets=offsets, top_k=top_k,
            logprob_temperature=logprob_temperature, tail=tail,
        )  # fmt: skip

    @classmethod
    def from_samples(
        cls, ids: Any, temperature: float = 1.0, *, weights: Any | None = None, classes: int | None = None
    ) -> TopKTeacher:
        """Make a teacher of classes that were drawn at random in each row, an estimate of the full distribution.

        Without ``weights``, the classes are drawn from the teacher's softmax at the temperature of the loss. The mean
        gradient of the forward divergence, over the draws, is then that of the full teacher. The value of the loss is
        not unbiased: it is larger, by what the draws' entropy lacks, which does not depend on the student.

        With classes drawn from another distribution q, ``weights`` are p / q. The estimate of a row is divided by its
        total weight, as a distribution must be. For an unbiased gradient, pass the mean weight of each row to the loss,
        ``weights=(p / q).mean(1)``, with ``reduction="sum"`` or ``"none"``.

        Args:
            ids: (M, s) drawn classes, integers, repeats included; negative: no draw.
            temperature: The T of the loss.
            weights: (M, s) p / q of each draw, not negative; None: 1.
            classes: Number of all classes, to check the ids. None: not checked.

        Returns:
            The teacher, (M, s), without a tail. A row without draws adds nothing to the loss.

        Raises:
            ShapeError: If shapes do not fit, or a weight is negative or not finite.
            IndexError: If a class is not below ``classes``.

        Source: Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, ACL 2025,
        https://arxiv.org/abs/2503.16870, section 4.
        """
        from kdfast.ops.kd_loss.offline import from_samples

        return from_samples(ids, temperature, weights=weights, classes=classes)

    def to_logits(self, like: Tensor, temperature: float) -> Tensor:
        """Return logits of all classes, in which those left out of a row share its tail as they do in other logits.

        As a top-k teacher, the tail is one event: the loss does not say how the student should share it among its
        classes. At high temperatures the tail holds much of the mass, and the student loses accuracy. Logits of the
        same teacher on a similar input are a good guess.

        Args:
            like: (M, C) the other logits, finite.
            temperature: The T of the tail.

        Returns:
            float32 or wider, (M, C), on which kd_loss at this temperature sees the kept classes and the tail as they
            are; -inf for classes left out of a row whose tail is -inf. A row without entries takes the other logits.

        Raises:
            ShapeError: ``like`` is not (M, C), or the temperature is out of range.
            IndexError: A class is negative or not below C.
        """
        from kdfast.ops.kd_loss.validation import check_temperature

        check_temperature(temperature)
        if like.dim() != 2 or self.values.dim() != 2 or like.shape[0] != self.values.shape[0]:
            raise ShapeError(
                f"`like` has shape {tuple(like.shape)}: must be ({self.values.shape[0]}, C), one row for each of the "
                "teacher's"
            )
        if self.classes.numel():
            low, high = (int(x) for x in torch.aminmax(self.classes))
            if low < 0 or high >= like.shape[1]:
                raise IndexError(f"classes go from {low} to {high}: must be 0 to {like.shape[1] - 1}, as in `like`")
        dtype = torch.promote_types(torch.promote_types(self.values.dtype, like.dtype), torch.float32)
        # Entries that are left out may name a class that is kept; they go to a column of their own.
        columns = self.classes.long().where(self.values > -math.inf, like.shape[1])
        scaled = torch.nn.functional.pad(like.to(dtype) / temperature, (0, 1))
        scaled = scaled.scatter_(1, columns, -math.inf)
        scaled[:, -1] = -math.inf
        shift = self.tail.to(dtype).unsqueeze(1) - scaled.logsumexp(1, keepdim=True)
        shared = scaled.add_(shift).mul_(temperature)
        return shared.scatter_(1, columns, self.values.to(dtype))[:, :-1]


torch.serialization.add_safe_globals([TopKTeacher])


class KDCall(NamedTuple):
    """Checked arguments of one ``kd_loss`` call; made by ``validation.make_call``.

    A named tuple, so that ``*call`` flattens it for the custom operator and ``KDCall(*args)`` restores it there.

    Attributes:
        logits: (N, C) student logits.
        labels: (N,) int64, (N, C) probabilities, or None if alpha is 1.
        teacher: (M, C) teacher logits; (M, k) values if ``classes`` is set.
        rows: (N,) int64 teacher rows, or None for row i.
        classes: (M, k) int32 class ids of a top-k teacher, or None.
        tail: (M,) log-mass of the classes that a top-k teacher leaves out, or None.
        weights: (N,) sample weights, or None.
        alphas: (N,) alpha of each sample, in place of ``alpha``, or None.
        temperatures: (N,) T of each sample, in place of ``temperature``, or None.
        alpha: Weight of the divergence, in [0, 1].
        temperature: T > 0.
        t_squared: Whether the divergence is multiplied by T^2.
        ignore_index: Label of the rows to ignore.
        reduction: "mean", "sum" or "none".
        reverse: Whether the divergence is KL(student || teacher).
        divergence: "kl", "jsd", "dkd" or "standardized".
        first_weight: Weight of the first part of a divergence that has two: of KL(teacher || mixture) for "jsd", of the
            label's class against all others for "dkd"; else 0.
        second_weight: Weight of the second part: of KL(student || mixture), or of the other classes among themselves.
        label_smoothing: Share of the uniform distribution in the target of the cross-entropy, at least 0 and below 1.
    """

    logits: Tensor
    labels: Tensor | None
    teacher: Tensor
    rows: Tensor | None
    classes: Tensor | None
    tail: Tensor | None
    weights: Tensor | None
    alphas: Tensor | None
    temperatures: Tensor | None
    alpha: float
    temperature: float
    t_squared: bool
    ignore_index: int
    reduction: str
    reverse: bool
    divergence: str = "kl"
    first_weight: float = 0.0
    second_weight: float = 0.0
    label_smoothing: float = 0.0

    def replace(self, **changes: Any) -> KDCall:
        """Return a copy with some fields replaced; ``_replace`` cannot be traced by ``torch.compile`` in torch 2.8."""
        values: list[Any] = [changes.get(name, value) for name, value in zip(KDCall._fields, self, strict=True)]
        return KDCall(*values)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, some of them None."""
        return self[:9]

    @property
    def hard_labels(self) -> Tensor | None:
        """The labels if they are classes; None if there are none, or if they are probabilities."""
        return None if self.labels is None or self.labels.is_floating_point() else self.labels

    @property
    def soft_labels(self) -> Tensor | None:
        """The labels if they are probabilities."""
        return self.labels if self.labels is not None and self.labels.is_floating_point() else None

    @property
    def use_ce(self) -> bool:
        """Whether the cross-entropy may have non-zero weight."""
        return self.alphas is not None or self.alpha < 1

    @property
    def use_kl(self) -> bool:
        """Whether the divergence may have non-zero weight."""
        return self.alphas is not None or self.alpha > 0

    @property
    def operator(self) -> str:
        """The operator in ``backends.TABLE`` whose backends have all that the call needs."""
        if self.alphas is not None or self.temperatures is not None or self.label_smoothing > 0:
            return "kd_loss_options" if self.classes is None else "kd_loss_topk_options"
        return "kd_loss" if self.divergence == "kl" else "kd_loss_divergences"

    @property
    def kl_factor(self) -> float:
        """Factor of the divergence in the loss, alpha T^2 or alpha, if it is the same for all samples."""
        return self.alpha * self.temperature**2 if self.t_squared else self.alpha

    def new_loss(self) -> Tensor:
        """Uninitialized float32 loss: (N,) for the reduction "none", else a scalar."""
        shape = self.logits.shape[:1] if self.reduction == "none" else ()
        return self.logits.new_empty(shape, dtype=torch.float32)

    def grad_scale(self) -> float:
        """Power of two that scales the stored gradient; 1 except for float16.

        The factor of ``torch.amp.GradScaler`` arrives only in the backward pass. Without a scale, a float16 gradient of
        an improbable class, or one divided by many rows, would be rounded to zero before that. A row's gradient of the
        forward divergence is at most 1 + alpha T in magnitude, so it stays finite when scaled by 1024, up to T = 31.
        That of the reverse divergence grows with the spread of the logits, to alpha / 4 of that spread (over T^2
        without ``t_squared``), and stays finite when scaled by 4 for logits up to 1e4. That of standardized logits
        grows as their deviation shrinks. That of decoupled parts is the forward divergence's times their weights.
        Temperatures of single samples are not read: scaled by 16, a gradient stays finite up to T = 4,000. Weighted
        rows have no bound in a sum or without reduction. Soft labels are two calls, whose gradients are added.
        """
        weighted = self.weights is not None and self.reduction != "mean"
        if self.logits.dtype != torch.float16 or weighted or self.soft_labels is not None:
            return 1.0
        is_known = self.temperatures is None
        largest = max(self.temperature, 1 / self.temperature) if is_known else 1.0
        if largest > 31:
            return 1.0
        most = 1024.0 if is_known else 16.0
        if self.divergence == "standardized" and self.use_kl:
            return 16.0
        if self.divergence == "dkd" and self.use_kl:
            return most if largest * (self.first_weight + self.second_weight) <= 62 else 1.0
        if self.reverse and self.use_kl:
            return 4.0 if self.t_squared or (is_known and self.temperature >= 1) else 1.0
        return most
