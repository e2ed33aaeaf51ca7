"""Write tables of the README and the documentation from bench/results: gpu/results.jsonl and linear_kd_loss.json.

    python bench/make_tables.py [--check]

A table replaces the lines between `<!-- gpu NAME -->`, or `<!-- cpu NAME -->`, and `<!-- end -->`. A value that no row
holds is *not measured*.
With --check nothing is written, and the exit code is 1 if a page differs from its results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu.results import COMMITTED, ROOT, Row, read_rows

PAGES = (ROOT / "README.md", ROOT / "docs" / "results" / "speed.md")
MISSING = "*not measured*"
LINEAR = ROOT / "bench" / "results" / "linear_kd_loss.json"
_BLOCK = re.compile(r"(?P<begin><!-- (?:gpu|cpu) (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
# Classes, and the target of the share in half precision.
LOSSES = {10: "", 100: "", 1000: "90%", 8192: "", 32000: "75%", 131072: "55%", 262144: ""}
# Networks and batch sizes of the training.
SETTINGS = (("resnet32", 64), ("resnet32", 128), ("resnet32", 512), ("resnet18", 128), ("resnet18", 512))
SANITIZED = ("kd_loss", "grad_norms", "softmax_head", "views")
STUDENTS = ("KD, seed 0", "no KD, seed 0")


class Measured:
    """The newest row of each measurement on a GPU."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row["part"], row["key"]): row for row in rows if row["kind"] == "cuda" and row["key"]}

    def row(self, part: str, key: str) -> Row:
        """Return a row; an empty one if there is none or it failed."""
        row = self._rows.get((part, key), {})
        return {} if row.get("outcome") == "failed" else row

    def text(self, part: str, key: str, show: Callable[[Row], str]) -> str:
        """Return a value of a row as text."""
        row = self.row(part, key)
        return show(row) if row else MISSING

    def machine(self, row: Row) -> str:
        """Return device and commit of a row."""
        facts = self.row("machine", row["run"]) if row else {}
        return f"{facts['name']}, {facts['commit']}" if facts else ""

    def share(self, row: Row, milliseconds: str) -> str:
        """Return the share of the bandwidth of the fastest copy that was measured on the device of a row."""
        name = self.row("machine", row["run"]).get("name")
        machines = [other for (part, _), other in self._rows.items() if part == "machine" and other["name"] == name]
        copy = max(other["copy_bytes_per_second"] for other in (row, *machines))
        return f"{row['bytes'] / (row[milliseconds] / 1e3) / copy:.0%}"

    def machines(self) -> list[str]:
        """Return a line for each device, driver and version of torch."""
        found = {}
        for (part, _), row in self._rows.items():
            if part == "machine":
                driver = row["idle"].get("driver_version", "unknown driver")
                found[row["name"], driver, row["torch"]] = row
        return [
            f"{name}, driver {driver}, torch {torch}, triton {row['versions']['triton']}, "
            f"nvcc {row['versions']['nvcc']}: a copy moves {row['copy_bytes_per_second'] / 1e12:.2f} TB/s"
            for (name, driver, torch), row in found.items()
        ]


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machines(measured: Measured) -> str:
    """Return a sentence on the devices."""
    found = measured.machines()
    return "".join(f"- {line}\n" for line in found) if found else "No GPU has been available.\n"


def kd_loss(measured: Measured) -> str:
    """Return shares of the copy bandwidth by number of classes."""
    rows = []
    for c, target in LOSSES.items():
        half, single, few = (f"{name} C={c} forward" for name in ("bfloat16", "float32", "latency bfloat16"))
        rows.append(
            (
                str(c),
                measured.text(
                    "kd_loss", half, lambda row: f"{measured.share(row, 'forward_ms')} ({row['forward_ms']:.3f} ms)"
                ),
                measured.text("kd_loss", half, lambda row: measured.share(row, "ms")),
                measured.text("kd_loss", f"{half} scaled", lambda row: measured.share(row, "ms"))
                if c in (1000, 32000)
                else "",
                measured.text("kd_loss", single, lambda row: measured.share(row, "forward_ms")),
                measured.text("kd_loss", few, lambda row: f"{row['microseconds']:.1f} µs") if c in (100, 1000) else "",
                target and f">= {target}",
                measured.machine(measured.row("kd_loss", half)),
            )
        )
    titles = (
        "classes", "bf16, loss and gradient", "bf16, with backward", "the same, loss scaled", "fp32, loss and gradient",
    )  # fmt: skip
    return markdown((*titles, "128 rows, bf16", "target, bf16", "measured on"), rows)


def training(measured: Measured) -> str:
    """Return rates of training and what a step launches."""
    rows = []
    for (net, batch), compiled in itertools.product(SETTINGS, ("", " compiled")):
        key = f"{net} B={batch}{compiled}"
        rows.append(
            (
                f"{net}, batch {batch}{compiled and ', torch.compile'}",
                measured.text("training", key, lambda row: f"{row['cached']:,.0f} images/s"),
                measured.text("training", key, lambda row: f"{row['cached_to_plain']:.3f}x"),
                measured.text("training", key, lambda row: f"{row['online_to_plain']:.2f}x"),
                measured.text("training", f"profile {key}", launches),
                measured.machine(measured.row("training", key)),
            )
        )
    titles = (
        "student, bf16",
        "cached KD",
        "epoch, cached / plain",
        "epoch, online / plain",
        "launches, kernels a step",
    )
    return markdown((*titles, "measured on"), rows)


def launches(row: Row) -> str:
    """Return launches and kernels of a profile."""
    return f"{row['launches']:.0f}, {row['kernels']:.0f}"


def students(measured: Measured) -> str:
    """Return whole runs."""
    rows = [
        (
            key.replace("KD, seed 0", "KD"),
            measured.text("students", key, lambda row: f"{row['seconds']:.0f} s"),
            measured.text("students", key, lambda row: f"{row['command_seconds']:.0f} s"),
            measured.text("students", key, lambda row: f"{row['test_top1']:.2f}"),
            measured.machine(measured.row("students", key)),
        )
        for key in STUDENTS
    ]
    return markdown(("ResNet-32, 240 epochs, bf16", "training", "whole command", "top-1", "measured on"), rows)


def others(measured: Measured) -> str:
    """Return the remaining measurements, one a line."""

    def speedup(who: str) -> Callable[[Row], str]:
        return lambda row: f"{row['kdfast_is_faster'][who][0]:.1f}x" if who in row["kdfast_is_faster"] else MISSING

    def rate(row: Row) -> str:
        return f"{row['images_per_second']:,.0f} images/s"

    entries: list[tuple[str, str, str, Callable[[Row], str]]] = [
        ("gradient norms of ResNet-18, N = 128, / vmap", "gradients", "network resnet18 N=128", speedup("vmap")),
        ("the same / opacus ghost", "peers", "opacus resnet18 N=128", speedup("opacus ghost")),
        ("norms of a head, D = 512, C = 100 / vmap", "gradients", "head norms N=50000 D=512 C=100", speedup("vmap")),
        (
            "Hessian product of a head, K = 64 / jvp(grad)",
            "gradients",
            "head products N=50000 D=512 C=100 K=64",
            speedup("jvp(grad)"),
        ),
        ("building a cache, ResNet-32, fp32", "selection", "cache float32", rate),
        ("the same, bf16", "selection", "cache bfloat16", rate),
        (
            "IF-Beta, 50,000 samples, C = 100",
            "selection",
            "IF-Beta N=50000 D=64 C=100",
            lambda row: f"{row['score_seconds'] + row['search_seconds']:.1f} s",
        ),
        ("plain PyTorch loop with the teacher online, batch 128", "peers", "plain loop B=128", rate),
        *(
            (f"kd_loss, {n} rows of {c} classes / {name}", "peers", f"kd_loss C={c} N={n}", speedup(who))
            for c, n in ((100, 128), (1000, 16384), (131072, 4096))
            for who, name in (("compile", "torch.compile"), ("liger", "Liger-Kernel"))
        ),
        *(
            (f"{tool}, {group}", "sanitizer", f"{tool} {group}", lambda row: f"{row['errors']} errors")
            for tool in ("memcheck", "racecheck")
            for group in SANITIZED
        ),
    ]
    rows = [
        (title, measured.text(part, key, show), measured.machine(measured.row(part, key)))
        for title, part, key, show in entries
    ]
    return markdown(("what", "measured", "measured on"), rows)


def overview(measured: Measured) -> str:
    """Return the few rows of the README."""
    return markdown(
        ("one GPU", "measured", "target"),
        [
            (
                f"`kd_loss`, {c:,} classes, bf16: share of the copy bandwidth",
                measured.text("kd_loss", f"bfloat16 C={c} forward", lambda row: measured.share(row, "forward_ms")),
                f">= {LOSSES[c]}",
            )
            for c in (1000, 32000, 131072)
        ]
        + [
            (
                "ResNet-32 with cached KD, bf16, batch 128",
                measured.text("training", "resnet32 B=128", lambda row: f"{row['cached']:,.0f} images/s"),
                ">= 80,000 images/s",
            ),
            (
                "ResNet-32, 240 epochs on a tenth of CIFAR-100, cached KD",
                measured.text("students", STUDENTS[0], lambda row: f"{row['seconds']:.0f} s, {row['test_top1']:.2f}%"),
                "",
            ),
        ],
    )


def linear_kd_loss(results: dict[str, Any]) -> str:
    """Return the times and the memory of linear_kd_loss beside others, of a file of bench_linear_kd_loss.py."""
    titles = ("classes V, dtype", "teacher", "kdfast", "/ products", "memory / unfused")
    peers = ("compile", "unfused", "Liger", "TRL")
    cells = {(row["V"], row["dtype"], row["teacher"], row["what"]): row for row in results["rows"]}
    lines = []
    for v, dtype, teacher in dict.fromkeys(key[:3] for key in cells):
        ours = cells[v, dtype, teacher, "kdfast"]
        others = [cells.get((v, dtype, teacher, name)) for name in peers]
        lines.append(
            (
                f"{v:,}, {dtype}",
                teacher,
                f"{ours['seconds'][0] * 1e3:.1f} ms",
                f"{spread(ours['to_products'])}{met(ours['to_products'][0], 1.25)}",
                "" if ours["memory_to_unfused"] is None else share(ours["memory_to_unfused"]),
                *("" if row is None else spread(row["kdfast_is_faster"]) for row in others),
            )
        )
    if not lines:
        return f"{MISSING}\n"
    facts, versions = results["machine"], results["versions"]
    named = [f"torch {facts['torch']}", *(f"{name} {version}" for name, version in versions.items() if version)]
    where = f"{facts['cpu']}, {facts['threads']} threads, load {facts['load']:g}; {', '.join(named)}; {facts['commit']}"
    names = ("times torch.compile", "times unfused", "times Liger-Kernel", "times TRL")
    return f"{markdown((*titles, *names), lines)}\n{results['rounds']} rounds on {where}.\n"


def spread(values: Sequence[float]) -> str:
    """Return a median with its quartiles."""
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def met(value: float, most: float) -> str:
    """Return whether a bound is met."""
    return "" if value <= most else f", above {most:g}"


def share(value: float) -> str:
    """Return a share of memory, and whether its bound is met."""
    return f"{value:.1%}{met(value, 0.15)}"


def read_linear() -> dict[str, Any]:
    """Return the committed results of bench_linear_kd_loss.py; none before the first run."""
    found: dict[str, Any] = json.loads(LINEAR.read_text()) if LINEAR.exists() else {"rows": []}
    return found


TABLES: dict[str, Callable[[Measured], str]] = {
    "linear-kd-loss": lambda _: linear_kd_loss(read_linear()),
    "machines": machines,
    "kd-loss": kd_loss,
    "training": training,
    "students": students,
    "others": others,
    "overview": overview,
}


def fill(text: str, measured: Measured) -> str:
    """Return a page with its tables replaced."""
    return _BLOCK.sub(lambda block: block["begin"] + TABLES[block["name"]](measured) + block["end"], text)


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    measured = Measured(read_rows(COMMITTED))
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = fill(before, measured)
        if after != before:
            stale.append(page.name)
            if not options.check:
                page.write_text(after)
    print(f"{'differ from the results' if options.check else 'written'}: {', '.join(stale) or 'none'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
