"""What the GPU queue carries and reads: packed data, and the output of NVIDIA's profiler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.readers.registry import open_source
from kdfast.data.views import Normalization
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, load_model, save_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import study_rows  # noqa: E402
from gpu import data as gpu_data  # noqa: E402
from gpu import pack_data, sheets  # noqa: E402
from gpu.measure import studies, tools  # noqa: E402
from gpu.measure.training import summary  # noqa: E402
from gpu.results import append_row, read_rows  # noqa: E402
from gpu.sheets import LAYOUTS, read_sheet, write_archive, write_sheet  # noqa: E402


@pytest.mark.parametrize("count", [1, 100, 101])
def test_a_sheet_keeps_every_pixel(tmp_path, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    write_sheet(tmp_path / "sheet.webp", images)
    np.testing.assert_array_equal(read_sheet(tmp_path / "sheet.webp", count), images)


@pytest.fixture(params=["cifar10", "cifar100"])
def packed(request, tmp_path, monkeypatch):
    """Packed data of which a quarter was kept; the archive and the folder."""
    draw = np.random.default_rng(0)
    classes = {"cifar10": 10, "cifar100": 100}[request.param]
    splits = [
        (draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % classes) for count in (800, 100)
    ]
    archive = tmp_path / LAYOUTS[request.param].folder
    write_archive(archive, request.param, *splits, [f"class {number}" for number in range(classes)])
    names = tuple(f"class {number}" for number in range(classes))
    norm = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    save_model(tmp_path / "T.pt", Model(build_net("resnet8", classes).eval(), "resnet8", classes, names, norm))
    command = ["pack", "--data", str(archive), "--teacher", str(tmp_path / "T.pt"), "--fraction", "0.25"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "packed"), "--rest", str(tmp_path / "rest")])
    monkeypatch.setattr(sheets, "_LARGEST", 250)
    pack_data.main()
    return archive, tmp_path / "packed"


def test_packed_data_are_the_kept_samples_and_the_whole_test_split(packed, tmp_path):
    archive, folder = packed
    found = gpu_data.unpacked(folder, tmp_path / "work")
    whole, part = open_source(str(archive)), open_source(found.data)
    ids = np.load(folder / "labels.npz")["ids"]
    assert (found.fraction, found.packed, len(ids)) == (0.25, True, 200)
    np.testing.assert_array_equal(part.train.read(np.arange(200)), whole.train.read(ids))
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[ids])
    np.testing.assert_array_equal(part.test.read(np.arange(100)), whole.test.read(np.arange(100)))
    assert (part.classes, part.view_spec, part.kind) == (whole.classes, whole.view_spec, whole.kind)
    assert load_model(found.teacher).digest == load_model(tmp_path / "T.pt").digest


def test_the_rest_completes_the_packed_data(packed, tmp_path):
    archive, folder = packed
    found = gpu_data.unpacked(folder, tmp_path / "work", tmp_path / "rest")
    whole, joined = open_source(str(archive)), open_source(found.data)
    assert sorted(path.name for path in (tmp_path / "rest").glob("*.webp")) == ["0.webp", "1.webp", "2.webp"]
    assert (found.fraction, joined.fingerprint) == (1.0, whole.fingerprint)
    np.testing.assert_array_equal(joined.train.read(np.arange(800)), whole.train.read(np.arange(800)))
    np.testing.assert_array_equal(joined.train.labels, whole.train.labels)


def test_the_rest_is_used_once_it_is_whole(packed, tmp_path, monkeypatch):
    for name, value in {"DATA": "packed", "REST": "rest", "QUEUE_WORK": "work"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    for name in ("1.webp", "labels.npz"):
        (tmp_path / "rest" / name).rename(tmp_path / name)
        assert gpu_data.whole_data("cuda") is None
        (tmp_path / name).rename(tmp_path / "rest" / name)
    found = gpu_data.whole_data("cuda")
    assert found is not None
    assert open_source(found.data).fingerprint == open_source(str(packed[0])).fingerprint


def test_a_damaged_rest_is_rejected(packed, tmp_path):
    _, folder = packed
    labels = dict(np.load(tmp_path / "rest" / "labels.npz"))
    labels["rest"][[0, 1]] = labels["rest"][[1, 0]]
    np.savez(tmp_path / "rest" / "labels.npz", **labels)
    with pytest.raises(SystemExit, match="rest is damaged"):
        gpu_data.unpacked(folder, tmp_path / "work", tmp_path / "rest")


def test_damaged_packed_data_are_rejected(packed, tmp_path):
    _, folder = packed
    images = read_sheet(folder / "train.webp", 200)
    images[17, 3, 5, 1] ^= 1
    write_sheet(folder / "train.webp", images)
    with pytest.raises(SystemExit, match="damaged"):
        gpu_data.unpacked(folder, tmp_path / "work")


def test_only_cifar_is_packed(tmp_path, monkeypatch):
    norm = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    save_model(tmp_path / "T.pt", Model(build_net("resnet8", 10).eval(), "resnet8", 10, tuple("0123456789"), norm))
    monkeypatch.setattr(sys, "argv", ["pack", "--data", "digits", "--teacher", str(tmp_path / "T.pt")])
    with pytest.raises(SystemExit, match="digits"):
        pack_data.main()


def test_random_data_are_made_once(tmp_path):
    first = gpu_data.random_data(tmp_path, "cpu")
    before = Path(first.teacher).read_bytes()
    assert gpu_data.random_data(tmp_path, "cpu") == first
    assert Path(first.teacher).read_bytes() == before
    assert not first.packed
    assert len(open_source(first.data).classes) == 100


def test_a_study_that_fails_stops_no_other_and_its_finished_runs_have_a_row(tmp_path, monkeypatch):
    environment = {"QUEUE_RESULTS": "rows.jsonl", "QUEUE_PART": "studies", "QUEUE_WORK": ".", "DEVICE": "cpu"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "whole_data", lambda device: "data")
    monkeypatch.setattr(studies, "_COMMANDS", {"cpu": {"first": "fig6", "second": "fig7"}})
    called = []

    def reproduce(command, data, out, device):
        called.append(command)
        shared = {"machine": {"device": "CPU", "threads": 1}, "settings": {}, "seed": len(called), "seconds": 1 / 3}
        row = dict.fromkeys(study_rows.FIELDS) | shared | {"study": command, "cell": {"recipe": {}}}
        append_row(out / "results.jsonl", row)
        if len(called) == 1:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(studies, "reproduce", reproduce)
    with pytest.raises(SystemExit, match="failed: first"):
        studies.main()
    studies.main()
    studies.main()
    assert called == ["fig6", "fig7", "fig6"]
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["key"], row["repeat"]) for row in rows] == [("first", True), ("second", False), ("first", False)]
    assert [[(run["study"], run["seed"]) for run in row["runs"]] for row in rows] == [
        [("fig6", 1)], [("fig7", 2)], [("fig6", 3)],
    ]  # fmt: skip
    assert study_rows.short_rows(rows) == [run for row in rows for run in row["runs"]]


NCU = """==PROF== Connected to process 12
some output of the program
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","python","h","dense_kernel","1","7","(128, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes.sum","Gbyte","1.5"
"0","12","python","h","dense_kernel","1","7","(128, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics","smsp__inst_executed.sum","inst","1,234,567"
"1","12","python","h","scale","1","7","(128, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes.sum","byte","n/a"
"""  # noqa: E501


def test_counters_are_read_kernel_by_kernel():
    assert tools.parse(NCU) == [
        {"name": "dense_kernel", "dram__bytes.sum": [1.5, "Gbyte"], "smsp__inst_executed.sum": [1234567.0, "inst"]},
        {"name": "scale", "dram__bytes.sum": "n/a"},
    ]
    assert tools.parse("==ERROR== no permission") == []


# Replaces compute-sanitizer: prints what the real one does at the end.
SANITIZER = """#!/usr/bin/env bash
echo "========= {summary}"
exit {code}
"""


@pytest.mark.parametrize(
    ("summary", "code", "found"),
    [
        ("ERROR SUMMARY: 0 errors", 0, {"errors": 0}),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, {"errors": 0}),
        ("ERROR SUMMARY: 3 errors", 99, "3 errors"),
        ("RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 99, "2 errors"),
        ("Error: Device not supported", 1, "no summary"),
        ("ERROR SUMMARY: 0 errors", 1, "exit code 1"),
    ],
)
def test_the_sanitizer_must_say_that_there_are_no_errors(tmp_path, summary, code, found):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(summary=summary, code=code))
    tool.chmod(0o755)
    if isinstance(found, dict):
        assert tools.sanitized(str(tool), "memcheck", "kd_loss") == found
    else:
        with pytest.raises(RuntimeError, match=found):
            tools.sanitized(str(tool), "memcheck", "kd_loss")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["kd_loss", "grad_norms", "softmax_head", "views", "dense-1000"])
def test_small_cases_run_on_a_cpu(group):
    command = [sys.executable, "-m", "gpu.measure.small_cases", group, "cpu"]
    subprocess.run(command, cwd=ROOT / "bench", check=True)


def test_the_profile_counts_launches_waits_and_kernels():
    class Event:
        def __init__(self, key, count, device=False, spent=0.0):
            kinds = torch.autograd.DeviceType
            self.key, self.count, self.device_type = key, count, kinds.CUDA if device else kinds.CPU
            self.self_device_time_total, self.self_cpu_time_total = spent, 1.0

    class Profile:
        def key_averages(self):
            return [
                Event("cudaLaunchKernel", 10), Event("cuLaunchKernelEx", 4), Event("cudaGraphLaunch", 2),
                Event("cudaMemcpyAsync", 2), Event("cudaStreamSynchronize", 1), Event("aten::add", 99),
                Event("kernel_a", 6, device=True, spent=20.0), Event("kernel_b", 4, device=True, spent=80.0),
            ]  # fmt: skip

    found = summary(Profile(), 2, "cuda")
    assert (found["launches"], found["waits"], found["kernels"], found["kernel_microseconds"]) == (9, 0.5, 5, 50)
    assert next(iter(found["longest"].items())) == ("kernel_b", {"microseconds": 40.0, "count": 2.0})
    assert "aten::add" not in found["calls"]
    json.dumps(found)
