"""As triton_grid.py, for the divergences other than KL."""

from __future__ import annotations

import itertools
import json
import math
import sys

import torch
from triton_grid import GROUPS, ROUNDING, check, compare_with_eager, make_case, record, run_both, run_triton

import kdfast

OPTIONS = {
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "dkd": {"divergence": "dkd", "dkd_weights": (0.7, 3.0)},
    "standardized": {"divergence": "standardized"},
}


def shapes(name):
    """Rows of one and of several tiles, several rows a program, every dtype and way to compute exp(z)."""
    given = OPTIONS[name]
    for dtype in ROUNDING:
        for (n, c), t in itertools.product([(3, 2), (70, 10), (5, 100), (3, 257), (2, 1000)], (1.0, 4.0, 3.0)):
            check(name, *make_case(n, c, dtype), temperature=t, slack=1e-5, **given)
    for c, t, dtype in ((9000, 2.0, torch.float32), (20001, 3.0, torch.float32), (32768, 4.0, torch.float16)):
        check(name, *make_case(2, c, dtype), temperature=t, slack=1e-5, **given)
    z, y, t, r = make_case(2, 40000)
    check(name, z.sort(1).values, y, t.sort(1).values, r, slack=1e-5, **given)  # maxima increase with every tile
    z, y, t, r = make_case(6, 100)
    check(name, z.t().contiguous().t(), y, t.t().contiguous().t(), r, slack=1e-5, **given)
    check(name, z[:1].expand(6, -1), y, t[:1].expand(8, -1), r, slack=1e-5, **given)
    check(name, z, torch.stack([y, y], 1)[:, 0], t, torch.stack([r, r], 1)[:, 1], slack=1e-5, **given)


def options(name):
    """Weights of the parts, reductions, sample weights, missing labels, and the loss without a gradient."""
    given = {**OPTIONS[name], "slack": 1e-5}
    for alpha, squared, reduction in itertools.product((0.0, 0.3, 1.0), (True, False), ("mean", "sum", "none")):
        args, w = make_case(5, 60), torch.rand(5)
        check(name, *args, alpha=alpha, t_squared=squared, reduction=reduction, weights=w, temperature=2.0, **given)
    for c, alpha in itertools.product((60, 9000), (0.5, 1.0)):
        z, y, t, r = make_case(3, c)
        losses = [
            kdfast.kd_loss(x, y, t, r, alpha=alpha, backend="triton", **OPTIONS[name]).detach()
            for x in (z, z.clone().requires_grad_())
        ]
        record(name, torch.equal(*losses), "loss without a gradient")
    z, y, t, r = make_case(5, 60)
    check(name, z, y, t[:5], None, **given)
    if name == "dkd":
        for parts in ((1.0, 0.0), (0.0, 1.0)):
            check(name, z, y, t, r, alpha=1.0, divergence="dkd", dkd_weights=parts, slack=1e-5)
    else:
        check(name, z, None, t, r, alpha=1.0, **given)


def masks(name):
    """Masked classes, also all of the first tile; for one network only; NaN and infinity."""
    given = {**OPTIONS[name], "slack": 2e-5}
    for c in (100, 17000):
        z, y, t, r = make_case(3, c)
        hidden = torch.arange(c) % 3 == 0
        z[:, hidden], t[:, hidden] = -math.inf, -math.inf
        y = torch.where(y < 0, y, 1)
        check(name, z, y, t, r, **given)
        z[:, : c // 2], t[:, : c // 2] = -math.inf, -math.inf
        check(name, z, torch.where(y < 0, y, c - 1 - (c - 1) % 3 + 1 if (c - 1) % 3 else c - 2), t, r, **given)
    z, y, t, r = make_case(3, 100)
    y = torch.where(y < 0, y, 1)
    masked = t.clone()
    masked[:, 5] = -math.inf
    check(name, z, y, masked, r, **given)
    if name == "jsd":
        masked = z.clone()
        masked[:, 5] = -math.inf
        check(name, masked, y, t, r, **given)
    for column, value in itertools.product((1, 50), (math.nan, math.inf)):
        for student in (True, False):
            z2, t2 = z.clone(), t.clone()
            (z2 if student else t2)[:, column] = value
            loss, grad = run_triton(z2, y, t2, r, **OPTIONS[name])
            ok = bool(loss.isnan()) and bool(grad[y >= 0].isnan().all()) and bool((grad[y < 0] == 0).all())
            record(name, ok, ("not hidden", column, value, student, loss, grad.isnan().sum(1)))
    z[:, 5] = -math.inf
    loss = run_triton(z, y, t, r, **OPTIONS[name])[0]
    record(name, bool(loss.isfinite() if name == "jsd" else loss == math.inf), ("masked for the student", loss))


def far(name):
    """Logits that are far apart or share an offset: the error is at most that of PyTorch in float32 plus 1e-6."""
    for (a, b), t, alpha in itertools.product(((100.0, 10.0), (10.0, 100.0), (1e4, 1e4)), (0.7, 1.0, 4.0), (0.5, 1.0)):
        z, y, teacher, r = make_case(3, 33, spread=1.0)
        # Of networks that share no class, the gradient of "jsd" is a difference of equal numbers.
        given = {"temperature": t, "alpha": alpha, "reduction": "none", "least": 0.1, **OPTIONS[name]}
        record(name, *compare_with_eager(a * z, y, b * teacher.float(), r, **given))
    z, y, t, r = make_case(3, 17000)
    one_large = z.clone()
    one_large[:, 3] = 1e4
    for student, teacher in ((one_large, t), ((z + 1e4).round(), (t.float() - 1e4).round())):
        record(name, *compare_with_eager(student, y, teacher, r, **OPTIONS[name]))
        record(name, *compare_with_eager(student[:, :40], y % 40, teacher[:, :40], r, **OPTIONS[name]))


def indices(name):
    """Ignored rows that hold NaN, no rows, and rows and labels that are out of range."""
    z, y, t, r = make_case(4, 50)
    for reduction in ("mean", "none"):
        loss, grad, *_ = run_both(z * math.nan, torch.full((4,), -100), t, r, reduction=reduction, **OPTIONS[name])
        record(name, bool((loss == 0).all() and (grad == 0).all()), ("ignored", reduction))
    loss, grad, *_ = run_both(z[:0], y[:0], t, r[:0], **OPTIONS[name])
    record(name, bool(loss == 0) and grad.shape == (0, 50), "no rows")
    z, y, t, r = make_case(20, 50)
    y[::3], r[:] = -100, torch.arange(20)
    clean = run_triton(z, y, t, r, **OPTIONS[name])
    z[::3], t[:20:3] = math.nan, math.nan  # of rows that share a program with others
    same = [torch.equal(a, b) for a, b in zip(clean, run_triton(z, y, t, r, **OPTIONS[name]), strict=True)]
    record(name, all(same) and bool((clean[1][::3] == 0).all()), "some ignored")
    z, y, t, r = make_case(4, 50)
    y[1] = 3
    for labels, rows in ((y, torch.tensor([0, 10**12, -1, 3])), (torch.tensor([1, 50, -1, 2]), r)):
        x = z.clone().requires_grad_()
        loss = kdfast.kd_loss(x, labels, t, rows, reduction="none", backend="triton", **OPTIONS[name])
        (grad,) = torch.autograd.grad(loss.sum(), x)
        bad = torch.tensor([False, True, True, False])
        ok = bool((loss.isnan() == bad).all() and (grad.isnan().all(1) == bad).all())
        record(name, ok, ("out of range", loss, grad.isnan().all(1)))


def own_numbers():
    """Alpha and temperature of each row, smoothed labels, rows without one of the terms, and numbers out of range."""
    for given in ({}, {"direction": "reverse"}, *OPTIONS.values()):
        for c in (10, 1000, 9000):
            z, y, t, r = make_case(4, c)
            r, t = torch.arange(4), t.float()
            alpha, temperature = torch.tensor([0.0, 7.0, 0.3, 1.0]), torch.tensor([2.0, math.nan, 0.7, 5.0])
            t[0] = math.nan  # not read, since alpha is 0
            smooth = {"label_smoothing": 0.1}
            for own in ({"alpha": alpha}, {"alpha": alpha, "temperature": temperature, "t_squared": False, **smooth}):
                check("own numbers", z, y, t, r, reduction="none", slack=1e-5, **own, **given)
            t[0] = 1.0
            for own in ({"temperature": temperature}, {"temperature": 2.0, **smooth}):
                check("own numbers", z, y, t, r, slack=1e-5, **own, **given)
        out = {"alpha": torch.tensor([0.5, 1.5, -0.1, 0.5]), "temperature": torch.tensor([1.0, 1.0, 1.0, -1.0])}
        x, y = torch.randn(4, 20, requires_grad=True), torch.arange(4)
        loss = kdfast.kd_loss(x, y, torch.randn(4, 20), reduction="none", backend="triton", **out, **given)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        bad = torch.tensor([False, True, True, True])
        ok = bool((loss.isnan() == bad).all() and (grad.isnan().all(1) == bad).all())
        record("own numbers", ok, ("out of range", given, loss, grad.isnan().all(1)))


def special_cases():
    """What one of the divergences alone can meet."""
    z, t = torch.zeros(2, 20), torch.zeros(2, 20)
    z[:, :10], t[:, 10:] = -math.inf, -math.inf
    loss, grad = run_triton(z, None, t, alpha=1.0, temperature=1.0, divergence="jsd")
    record("special", abs(loss.item() - math.log(2)) < 1e-6 and grad.abs().max() < 1e-7, ("disjoint", loss, grad))
    for c in (12, 9000):  # the label is almost certain: 1 - softmax would be 0
        z, _, t, _ = make_case(4, c)
        y, t = torch.arange(4), t[:4].float()
        for x in (z, t):
            x[y, y] = 40.0 + math.log(c)
        for parts in ((1.0, 0.0), (0.0, 1.0), (1.0, 8.0)):
            options = {"alpha": 1.0, "temperature": 1.0, "divergence": "dkd", "dkd_weights": parts}
            found = run_both(z, y, t, **options)
            errors = [
                ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found[:2], found[2:], strict=True)
            ]
            record("special", max(errors) < 2e-5, ("almost certain", c, parts, errors))
    z, t, y = torch.randn(1, 8), torch.full((1, 8), -math.inf), torch.tensor([2])
    t[0, 2] = 1.0
    check("special", z, y, t, **OPTIONS["dkd"])
    student = torch.where(t.isneginf(), t, z)
    loss, grad = run_triton(student, y, t, **OPTIONS["dkd"])
    record("special", bool(loss == 0) and bool((grad == 0).all()), ("all others masked for both", loss, grad))
    loss, _ = run_triton(student, y, z, **OPTIONS["dkd"])
    record("special", loss == math.inf, ("all others masked for the student", loss))
    for spread, c in itertools.product((0.0, 1e-3), (20, 9000)):  # logits that are almost equal
        z, y, t, r = make_case(3, c)
        options = {"alpha": 1.0, "divergence": "standardized"}
        record("special", *compare_with_eager(5 + spread * z, y, t, r, **options))
    for name in OPTIONS:  # one class
        loss, grad = run_triton(*make_case(3, 1), **OPTIONS[name])
        record("special", loss.abs() < 1e-6 and grad.abs().max() < 1e-6, ("one class", name, loss, grad))


ALL = (shapes, options, masks, far, indices)

if __name__ == "__main__":
    device, *names = sys.argv[1:]
    torch.set_default_device(device)
    for function in ALL:
        for name in OPTIONS:
            if not names or function.__name__ in names:
                function(name)
    for group, function in (("special", special_cases), ("own", own_numbers)):
        if not names or group in names:
            function()
    print(json.dumps(GROUPS))
