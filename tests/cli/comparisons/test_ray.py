"""`kdfast sweep` and `kdfast reproduce` on a Ray cluster of two nodes, which run on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

pytest.importorskip("ray")

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
nodes = [cluster.head_node, cluster.add_node(**size)]
print(cluster.address, *(node.all_processes["raylet"][0].process.pid for node in nodes), flush=True)
sys.stdin.read()
cluster.shutdown()
"""
SWEEP = ("sweep", "--data", "digits", "--student", "resnet8", "--kd", "off", "--batch-size", 32, "--fractions", 0.2)


class Cluster(NamedTuple):
    address: str
    raylets: tuple[int, int]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    words, messages = [sys.executable, "-c", CLUSTER], tmp_path_factory.mktemp("cluster") / "stderr"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with messages.open("w") as stderr:
        process = subprocess.Popen(words, stderr=stderr, env=environment, **pipes)
    if not (line := process.stdout.readline()):  # Ray gives up after half a minute on a busy machine
        process.communicate(timeout=120)
        pytest.fail(f"the cluster did not start: {messages.read_text()[-1000:]}")
    address, head, other = line.split()
    yield Cluster(address, (int(head), int(other)))
    process.communicate(timeout=120)


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a command on the cluster; kill it at the end of the test."""
    started: list[subprocess.Popen] = []

    def begin(*words: object) -> subprocess.Popen:
        engine = ("--engine", "ray", "--ray-address", cluster.address)
        arguments = [sys.executable, "-m", "kdfast", *map(str, (*words, *engine))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(arguments, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def facts(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return sorted((row["key"], row["weights"], row["test_top1"], row["subset"]) for row in rows)


def at_work(out: Path) -> dict[str, int]:
    """The process of every run that trains, by the folder of the run."""
    found = {}
    for lock in out.glob("runs/*/.kdfast.lock"):
        if (lock.parent / "metrics.jsonl").exists() and (holder := re.search(r"process (\d+)", lock.read_text())):
            found[lock.parent.name] = int(holder[1])
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_nodes_share_a_sweep_and_the_run_of_a_killed_worker_is_resumed(
    kdfast, start, cluster: Cluster, tmp_path: Path
) -> None:
    out, command = tmp_path / "out", (*SWEEP, "--steps", 120, "--seeds", "0,1,2,3")
    process = start(*command, "--jobs", "auto", "--json", "--out", out)
    wait_for(lambda: len(at_work(out)) == 2, process)
    workers = at_work(out)
    assert {psutil.Process(pid).ppid() for pid in workers.values()} == set(cluster.raylets)
    run, killed = next(iter(workers.items()))
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: at_work(out).get(run, killed) != killed or not (out / "runs" / run).exists(), process)
    told, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert len(json.loads(told)["rows"]) == 4, "and nothing else is written to the standard output"
    assert not list((out / "runs").iterdir())
    assert not list(out.glob(".command-*"))
    alone = kdfast(*command, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert facts(out) == facts(tmp_path / "alone")


@pytest.mark.slow
def test_a_study_makes_what_it_needs_once(kdfast, start, tiny: Path, tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(
        "title: T\nsource: S\nrecipe: {epochs: 4, batch_size: 10, views: 3}\n"
        "defaults: {student: resnet8, teacher: resnet8, fraction: 0.25}\ncells: [{kd: [off, on], term: [none, sp]}]\n"
    )
    command = ("reproduce", study, "--data", tiny, "--seeds", 2)
    process = start(*command, "--jobs", 2, "--out", tmp_path / "out")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert len(list((tmp_path / "out" / "teachers").glob("*.pt"))) == 1
    alone = kdfast(*command, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert facts(tmp_path / "out") == facts(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_75_and_every_run_saved(start, tmp_path: Path, number: int) -> None:
    process = start(*SWEEP, "--steps", 100_000, "--seeds", "0,1", "--jobs", 2, "--out", tmp_path)
    wait_for(lambda: len(at_work(tmp_path)) == 2, process)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert "run the same command again to resume" in err
    assert len(list(tmp_path.glob("runs/*/checkpoints/latest.json"))) == 2


@pytest.mark.slow
def test_runs_of_a_lost_node_are_resumed_by_others(kdfast, start, cluster: Cluster, tmp_path: Path) -> None:
    """The last test of the cluster."""
    out, command = tmp_path / "out", (*SWEEP, "--steps", 400, "--seeds", "0,1,2")
    process = start(*command, "--jobs", 2, "--out", out)
    wait_for(lambda: len(at_work(out)) == 2, process)
    os.kill(cluster.raylets[1], signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    alone = kdfast(*command, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert facts(out) == facts(tmp_path / "alone")
