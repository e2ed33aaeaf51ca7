"""A build killed with SIGKILL at random moments and restarted writes the same bytes as an uninterrupted one."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache

BUILDER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import conftest
from kdfast.teacher.build import build_cache
source, teacher = conftest.make_source(), conftest.make_teacher()
print("ready", flush=True)
build_cache(source, teacher, sys.argv[2], shard_bytes=72)
"""


def file_contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != "timing.json"}


def kill_once(folder, seconds):
    """Start a build and kill it after `seconds` of work; return whether it had finished before."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(Path(__file__).parent), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.kill()
    process.wait()
    process.stdout.close()
    return (folder / "manifest.json").exists()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_build_resumes_to_the_same_bytes(source, teacher, tmp_path, kills):
    build_cache(source, teacher, tmp_path / "uninterrupted", shard_bytes=72)
    draw = random.Random(kills)
    folder, unfinished = tmp_path / "killed-0", 0
    for kill in range(kills):
        if kill_once(folder, draw.uniform(0.02, 0.4)):
            assert file_contents(folder) == file_contents(tmp_path / "uninterrupted")
            folder = tmp_path / f"killed-{kill + 1}"
        else:
            unfinished += 1
    assert unfinished
    assert build_cache(source, teacher, folder, shard_bytes=72).complete
    assert file_contents(folder) == file_contents(tmp_path / "uninterrupted")
    assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "uninterrupted").iterdir()}
    TeacherCache.open(folder, source=source, teacher=teacher)
