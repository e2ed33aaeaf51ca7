"""The folder for the kernel hub: complete, without kdfast, equal to the formula, and loaded as by the hub's library."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast

ROOT = Path(kdfast.__file__).parent.parent
SCRIPT = ROOT / ".ci" / "hub_kernel.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("hub_kernel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("hub")
    module.write(out)
    return out


def test_every_import_is_in_the_folder_or_installed_with_torch(folder):
    build = folder / "build" / "torch-universal"
    files = sorted(build.rglob("*.py"))
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert base.with_suffix(".py").is_file() or (base / "__init__.py").is_file(), f"{path}: {node.module}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in {str(name).split(".")[0] for name in names}:
                    assert name in sys.stdlib_module_names | {"torch", "triton", "numpy"}, f"{path}: {name}"


def test_metadata_has_what_the_hub_asks_for(folder):
    metadata = json.loads((folder / "build" / "torch-universal" / "metadata.json").read_text())
    assert metadata["name"] == "kdfast-kd-loss"
    assert metadata["id"].isidentifier()
    assert metadata["backend"]["type"] == "cuda"
    assert metadata["python-depends"] == []
    assert (folder / "LICENSE").is_file()


ALONE = """
import importlib.util, json, os, sys, warnings
from pathlib import Path
import torch

warnings.filterwarnings("error", "kdfast")  # a fallback to another backend
sys.modules["kdfast"] = None  # importing it raises

def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

build = Path(sys.argv[1]) / "build" / "torch-universal"
kernel = load(build, json.loads((build / "metadata.json").read_text())["id"])
assert "triton" not in sys.modules
older = build / "kdfast_kd_loss" / "__init__.py"  # where earlier loaders look
assert set(kernel.kd_loss.__globals__["__name__"].split(".")) >= {"kdfast_kd_loss", "api"} and older.is_file()
torch.manual_seed(0)
hidden, weight, teacher = (torch.randn(*shape) for shape in ((12, 8), (50, 8), (30, 50)))
labels, rows = torch.randint(50, (12,)), torch.randint(30, (12,))
labels[3] = -100
a, t = 0.7, 3.0

z = (hidden @ weight.T).requires_grad_()
x = z.detach().double().requires_grad_()
p, q = (x / t).log_softmax(1), (teacher[rows].double() / t).log_softmax(1)
kl, ce = (q.exp() * (q - p)).sum(1), torch.nn.functional.cross_entropy(x, labels, reduction="none")
expected = (a * t**2 * kl + (1 - a) * ce)[labels != -100].mean()
[gradient] = torch.autograd.grad(expected, x)
for backend in ("reference", "triton"):
    loss = kernel.kd_loss(z, labels, teacher, rows, alpha=a, temperature=t, backend=backend)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0].double(), gradient, rtol=1e-4, atol=1e-6)
hidden.requires_grad_()
loss = kernel.linear_kd_loss(hidden, weight, labels, teacher, rows, alpha=a, temperature=t, chunk=5, backend="triton")
torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
[of_hidden] = torch.autograd.grad(loss, hidden)
torch.testing.assert_close(of_hidden.double(), gradient @ weight.double(), rtol=1e-4, atol=1e-5)
with torch.no_grad():
    auto = kernel.kd_loss(z, labels, kernel.topk_teacher(teacher, 50, t), rows, alpha=a, temperature=t)
torch.testing.assert_close(auto.double(), expected, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_copy_computes_the_formula_where_kdfast_is_not_installed(folder, tmp_path):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_library_of_the_hub_loads_it_beside_kdfast(folder, monkeypatch):
    kernels = pytest.importorskip("kernels")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kernel = kernels.get_local_kernel(folder)
    assert kernel.kd_loss is not kdfast.kd_loss
    torch.manual_seed(0)
    logits, labels, teacher = torch.randn(6, 20), torch.randint(20, (6,)), torch.randn(6, 20)
    torch.testing.assert_close(kernel.kd_loss(logits, labels, teacher), kdfast.kd_loss(logits, labels, teacher))
    namespace = json.loads((folder / "build" / "torch-universal" / "metadata.json").read_text())["id"].strip("_")
    assert hasattr(getattr(torch.ops, namespace), "linear_kd_loss")
