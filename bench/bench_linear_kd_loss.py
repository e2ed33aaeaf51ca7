"""`linear_kd_loss` against the loss on all logits, torch.compile, the matrix products alone, and other chunked losses.

    python bench/bench_linear_kd_loss.py [--rounds 7] [--threads N] [--classes 32000 128256] [--dtype float32]
    pytest bench/bench_linear_kd_loss.py --benchmark-only

Forward and backward from hidden states (256, 512) and weights (V, 512), both with gradients. Three teachers: float16
logits, and their 50 largest with a tail, with forward KL at T = 4 plus cross-entropy; and hidden states with their own
weights, with the Jensen-Shannon divergence at T = 1 plus cross-entropy, as the other libraries compute it (TRL's
without cross-entropy). "products" are the matrix products that any such loss needs, on whole matrices: logits, gradient
of hidden states, gradient of weights, and with a teacher of hidden states its logits. Losses and gradients are checked
against float64 first. Implementations run in turn, each twice, of which the second call is timed, as in a training
loop; a ratio is the median over the rounds, with quartiles. Extra memory is the peak above operands and gradients, in a
process of its own.

The rows are written to bench/results/linear_kd_loss.json; then `python bench/make_tables.py` writes the table of
docs/results/speed.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

sys.path.insert(0, str(Path(__file__).parent))

from harness import interleave, machine, table, write_results

N, H, K = 256, 512, 50
FORMS = ("logits", "top-k", "hidden")
CLASSES = (32000, 128256)
MOST_TIME, MOST_MEMORY = 1.25, 0.15  # of the matrix products, and of the loss on all logits
Args = dict[str, Tensor]


def inputs(v: int, dtype: torch.dtype) -> Args:
    """Return operands; hidden states and weights give logits with a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a = {
        "hidden": normal(N, H).to(dtype).requires_grad_(),
        "weight": normal(v, H).mul_(2 / H**0.5).to(dtype).requires_grad_(),
        "labels": torch.randint(0, v, (N,), generator=generator),
        "teacher": normal(N, v).mul_(2).half(),
        "teacher_hidden": normal(N, H).to(dtype),
        "teacher_weight": normal(v, H).mul_(2 / H**0.5).to(dtype),
    }
    a["values"], a["classes"], a["tail"] = kdfast.topk_teacher(a["teacher"], K, 4.0)
    return a


def unfused(a: Args) -> Tensor:
    """Forward KL and cross-entropy on all logits."""
    z, t = F.linear(a["hidden"], a["weight"]).float(), a["teacher"].float()
    kl = F.kl_div(F.log_softmax(z / 4, 1), F.log_softmax(t / 4, 1), log_target=True, reduction="batchmean")
    return 0.5 * F.cross_entropy(z, a["labels"]) + 0.5 * 16 * kl


def unfused_top_k(a: Args) -> Tensor:
    """Forward KL over k + 1 outcomes and cross-entropy on all logits."""
    z, ids = F.linear(a["hidden"], a["weight"]).float(), a["classes"].long()
    log_p = F.log_softmax(z / 4, 1)
    rest = torch.ones_like(log_p, dtype=torch.bool).scatter(1, ids, False)
    log_p_rest = torch.where(rest, log_p, -torch.inf).logsumexp(1, keepdim=True)
    log_p = torch.cat([log_p.gather(1, ids), log_p_rest], 1)
    log_q = F.log_softmax(torch.cat([a["values"].float() / 4, a["tail"].unsqueeze(1)], 1), 1)
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return 0.5 * F.cross_entropy(z, a["labels"]) + 0.5 * 16 * kl


def unfused_hidden(a: Args) -> Tensor:
    """Jensen-Shannon divergence and cross-entropy on all logits."""
    z = F.linear(a["hidden"], a["weight"]).float()
    log_p, log_q = F.log_softmax(z, 1), F.log_softmax(F.linear(a["teacher_hidden"], a["teacher_weight"]).float(), 1)
    m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    jsd = F.kl_div(m, log_q, log_target=True, reduction="sum") + F.kl_div(m, log_p, log_target=True, reduction="sum")
    return 0.5 * F.cross_entropy(z, a["labels"]) + 0.25 * jsd / N


def ours(a: Args) -> Tensor:
    """The public function on teacher logits."""
    return kdfast.linear_kd_loss(a["hidden"], a["weight"], a["labels"], a["teacher"], alpha=0.5, temperature=4.0)


def ours_low(a: Args) -> Tensor:
    """The same with the gradient computed in the backward pass."""
    return kdfast.linear_kd_loss(a["hidden"], a["weight"], a["labels"], a["teacher"], memory="low")


def ours_top_k(a: Args) -> Tensor:
    """The public function on the largest logits of the teacher."""
    teacher = kdfast.TopKTeacher(a["values"], a["classes"], a["tail"])
    return kdfast.linear_kd_loss(a["hidden"], a["weight"], a["labels"], teacher, alpha=0.5, temperature=4.0)


def ours_hidden(a: Args) -> Tensor:
    """The public function on hidden states of the teacher."""
    teacher = (a["teacher_hidden"], a["teacher_weight"])
    return kdfast.linear_kd_loss(
        a["hidden"], a["weight"], a["labels"], teacher, alpha=0.5, temperature=1.0, divergence="jsd"
    )


def liger(a: Args) -> Tensor:
    """Liger-Kernel's chunked loss; its defaults."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5)
    return loss(a["hidden"], a["weight"], a["teacher_hidden"], a["teacher_weight"], a["labels"])


def trl(a: Args) -> Tensor:
    """TRL's chunked divergence; without cross-entropy, and weighted like the divergence of the others."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    operands = (a["hidden"], a["weight"], None, a["teacher_hidden"], a["teacher_weight"], None)
    return 0.5 * ChunkedDivergenceFunction.apply(*operands, 0.5, 1.0)[0].mean()


def contenders(form: str) -> dict[str, Callable[[Args], Tensor]]:
    """Return losses by name for a teacher's form; the first is kdfast's."""
    torch._dynamo.reset()
    if form == "logits":
        plain = unfused
        found = {"kdfast": ours, "kdfast low": ours_low}
    elif form == "top-k":
        plain, found = unfused_top_k, {"kdfast": ours_top_k}
    else:
        plain = unfused_hidden
        found = {"kdfast": ours_hidden}
        for name, module, loss in (("Liger", "liger_kernel.chunked_loss", liger), ("TRL", "trl.kernels", trl)):
            try:
                __import__(module)
            except ImportError:
                print(f"{name} is not installed: not measured")
            else:
                found[name] = loss
    return found | {"unfused": plain, "compile": torch.compile(plain, dynamic=False)}


def step(loss: Callable[[Args], Tensor], a: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward."""
    value = loss(a)
    return (value, *torch.autograd.grad(value, (a["hidden"], a["weight"])))


def products(a: Args, form: str) -> None:
    """The matrix products, on whole matrices."""
    x, w = a["hidden"].detach(), a["weight"].detach()
    z = x @ w.t()
    if form == "hidden":
        a["teacher_hidden"] @ a["teacher_weight"].t()
    z @ w
    z.t() @ x


def check(losses: dict[str, Callable[[Args], Tensor]], a: Args, form: str) -> dict[str, float]:
    """Return each gradient's relative error against float64; raise if it exceeds rounding."""
    few = {name: x.detach() for name, x in a.items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in few.items()}
    exact |= {name: exact[name].requires_grad_() for name in ("hidden", "weight")}
    reference = {"logits": unfused_double, "top-k": top_k_double, "hidden": unfused_hidden_double}[form]
    truth = [x.detach() for x in step(reference, exact)]
    errors = {}
    for name, loss in losses.items():
        if name == "TRL":  # another loss
            continue
        got = [x.detach() for x in step(loss, a)]
        errors[name] = max(float((x.double() - y).norm() / y.norm()) for x, y in zip(got, truth, strict=True))
        if not errors[name] < 4 * torch.finfo(a["hidden"].dtype).eps + 1e-5:
            raise AssertionError(f"{name} is wrong: relative error {errors[name]:.1e}")
    return errors


def unfused_double(a: Args) -> Tensor:
    """The reference in float64."""
    return kdfast.linear_kd_loss(a["hidden"], a["weight"], a["labels"], a["teacher"], backend="reference")


def top_k_double(a: Args) -> Tensor:
    """The reference in float64."""
    teacher = kdfast.TopKTeacher(a["values"], a["classes"], a["tail"])
    return kdfast.linear_kd_loss(a["hidden"], a["weight"], a["labels"], teacher, backend="reference")


def unfused_hidden_double(a: Args) -> Tensor:
    """The reference in float64."""
    teacher = (a["teacher_hidden"], a["teacher_weight"])
    return kdfast.linear_kd_loss(
        a["hidden"], a["weight"], a["labels"], teacher, temperature=1.0, divergence="jsd", backend="reference"
    )


PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
import bench_linear_kd_loss as b
torch.set_num_threads({threads})
a = b.inputs({v}, torch.{dtype})
loss = b.contenders({form!r})[{name!r}]
b.step(loss, a)
open("/proc/self/clear_refs", "w").write("5")
read = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = read("VmRSS")
out = b.step(loss, a)
print("peak", read("VmHWM") - before - sum(x.numel() * x.itemsize for x in out))
"""


def extra_memory(name: str, v: int, dtype: torch.dtype, form: str) -> int | None:
    """Return the peak in bytes above operands and gradients."""
    if not sys.platform.startswith("linux"):
        return None
    values = {"v": v, "dtype": str(dtype)[6:], "form": form, "name": name, "threads": torch.get_num_threads()}
    code = PEAK.format(folder=str(Path(__file__).parent), **values)
    # The C library returns freed blocks of 1 MB and more to the system, so that the peak is that of this step.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "KDFAST_REUSE_GRADIENT": "0"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return int(out.split()[-1])


def measure(v: int, dtype: torch.dtype, form: str, rounds: int) -> list[dict[str, Any]]:
    """Return one row of the table for each implementation."""
    a, losses = inputs(v, dtype), contenders(form)
    errors = check(losses, a, form)
    calls: dict[str, Callable[[], Any]] = {name: lambda f=f: step(f, a) for name, f in losses.items()}
    timings = interleave({**calls, "products": lambda: products(a, form)}, rounds, repeated=True)
    memory = {name: extra_memory(name, v, dtype, form) for name in losses}
    rows = []
    for name, timing in timings.items():
        taken = memory.get(name)
        share = None if taken is None else taken / (memory["unfused"] or 1)
        low, high = timing.spread
        of_products = [1 / x for x in timing.ratio_to(timings["products"])]
        rows.append(
            {
                "V": v,
                "dtype": str(dtype)[6:],
                "teacher": form,
                "what": name,
                "seconds": [timing.median, low, high],
                "kdfast_is_faster": None if name == "kdfast" else list(timings["kdfast"].ratio_to(timing)),
                "to_products": [of_products[0], of_products[2], of_products[1]],
                "extra_bytes": taken,
                "memory_to_unfused": share,
                "error": errors.get(name),
            }
        )
    return rows


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as it is printed, with the targets."""

    def ratio(values: list[float] | None) -> str:
        return "" if values is None else f"{values[0]:.2f}x ({values[1]:.2f}-{values[2]:.2f})"

    ours, share, taken = row["what"].startswith("kdfast"), row["memory_to_unfused"], row["extra_bytes"]
    return {
        **{name: str(row[name]) for name in ("V", "dtype", "teacher", "what")},
        "ms": " ".join(f"{x * 1e3:.1f}" for x in row["seconds"]),
        "kdfast is faster": ratio(row["kdfast_is_faster"]),
        "time / products": ratio(row["to_products"]),
        "time target": verdict(row["to_products"][0], MOST_TIME) if row["what"] == "kdfast" else "",
        "extra memory, MB": "" if taken is None else f"{taken / 1e6:.0f}",
        "of unfused": "" if share is None else f"{share:.1%}",
        "memory target": verdict(share, MOST_MEMORY) if ours and share is not None else "",
        "error": "" if row["error"] is None else f"{row['error']:.0e}",
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the other libraries; None where not installed."""
    found: dict[str, str | None] = {}
    for name in ("liger-kernel", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def verdict(value: float, most: float) -> str:
    """Format a target with whether it is met."""
    return f"<= {most:g} {'met' if value <= most else 'MISSED'}"


def main() -> None:
    """Print the table and write bench/results/linear_kd_loss.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--classes", type=int, nargs="*", default=list(CLASSES))
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--teacher", nargs="*", default=list(FORMS), choices=FORMS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for v in options.classes:
        for dtype in options.dtype:
            for form in options.teacher:
                first = len(rows)
                rows += measure(v, getattr(torch, dtype), form, options.rounds)
                print(table([shown(row) for row in rows[first:]]), flush=True)
                # Written after each size, so that an interrupted run leaves its rows.
                facts = {"rounds": options.rounds, "tokens": N, "width": H, "top_k": K, "versions": versions()}
                path = write_results("linear_kd_loss", rows, **facts)
    print(f"\n{table([shown(row) for row in rows])}\n{machine()}\n{path}")


@pytest.mark.parametrize("name", ["kdfast", "compile", "unfused"])
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward(benchmark, form, name):
    benchmark.group = f"linear_kd_loss: {N} tokens of width {H}, 4096 classes, teacher's {form}"
    a, losses = inputs(4096, torch.float32), contenders(form)
    benchmark.extra_info["error"] = check({name: losses[name]}, a, form)[name]
    benchmark(step, losses[name], a)


if __name__ == "__main__":
    main()
