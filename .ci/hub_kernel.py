"""Write a folder for the kernel hub of Hugging Face: kd_loss and linear_kd_loss in torch and Triton, without kdfast.

    python .ci/hub_kernel.py FOLDER

``FOLDER/build/torch-universal`` then holds a copy of the modules that the losses import, for any device and version of
torch. Imports become relative, since the loader names the package itself; operators get a namespace of their own, since
several versions may be loaded beside each other and beside kdfast; and what needs compiled code is left out. On a CPU
the copy runs plain PyTorch. Upload it with ``hf upload --repo-type kernel NAME FOLDER``, and load it with
``kernels.get_local_kernel(FOLDER)`` or, from the hub, ``kernels.get_kernel``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "kdfast_kd_loss"
ENTRIES = {
    "ops.kd_loss.api": ("KDLoss", "TopKTeacher", "kd_loss", "kd_loss_terms", "topk_teacher"),
    "ops.kd_loss.linear.api": ("LinearTeacher", "linear_kd_loss"),
}
"""Modules with the public names."""
LOADED_BY_NAME = ["ops.kd_loss.triton.launch"]
"""Modules that are imported when a GPU is used."""
WITHOUT_EXTENSION = '''"""There is no shortcut without the compiled extension."""


def try_kd_loss(*_: object) -> None:
    """Return None: the call takes the general path."""
'''
REPLACED = {
    "ops.backends": [(r'\("native", "reference"\)', '("reference",)')],
    "ops.kd_loss.dispatch": [
        (r'"native": "kdfast\.ops\.kd_loss\.native", "triton": "kdfast\.ops\.kd_loss\.triton\.launch"',
         '"triton": ".triton.launch"'),
        (r"import_module\(_MODULES\[backend\]\)", "import_module(_MODULES[backend], __package__)"),
    ],
    "ops.kd_loss.autograd": [(r'"kdfast::', '"NAMESPACE::')],
    "ops.kd_loss.linear.autograd": [(r'"kdfast::', '"NAMESPACE::')],
}  # fmt: skip
"""Patterns in modules, each of which must occur."""
README = """---
library_name: kernels
license: apache-2.0
---

# kd_loss

Cross-entropy plus temperature-scaled KL divergence from a teacher, with the gradient in one pass (`kd_loss`), and the
same of hidden states, without the logits of all tokens (`linear_kd_loss`). Triton on a GPU, PyTorch elsewhere; needs
torch and numpy.

```python
from kernels import get_kernel

kernel = get_kernel("NAME", version=1, trust_remote_code=True)
loss = kernel.kd_loss(logits, labels, teacher_logits, rows, alpha=0.9, temperature=4.0)
```
"""


def source_of(module: str) -> str:
    """Return the source of a module, named without "kdfast."; an empty string if there is none."""
    if module == "ops.kd_loss.fast_path":
        return WITHOUT_EXTENSION
    path = ROOT.joinpath("kdfast", *module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text() if path.is_file() else ""


def imports_of(module: str) -> set[str]:
    """Return the modules of kdfast that a module imports, also in functions, and the packages they are in."""
    found = set()
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdfast."):
            name = str(node.module).removeprefix("kdfast.")
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names if source_of(f"{name}.{alias.name}")}
    return found | {module.rpartition(".")[0]} - {""}


def closure() -> list[str]:
    """Return all modules that the public names need."""
    found: set[str] = set()
    waiting = [*ENTRIES, *LOADED_BY_NAME]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports_of(module)
    return sorted(found)


def rewrite(module: str, is_package: bool) -> str:
    """Return a module's source with relative imports and the replacements.

    Raises:
        ValueError: A pattern does not occur, or a name of kdfast is left in code.
    """
    text = source_of(module)
    for pattern, replacement in REPLACED.get(module, []):
        text, count = re.subn(pattern, replacement, text)
        if not count:
            raise ValueError(f"{module} has no {pattern!r}: change REPLACED in {__file__}")
    dots = "." * (module.count(".") + (2 if is_package else 1))
    text = re.sub(r"^(\s*)from kdfast\.(\S+) import", rf"\1from {dots}\2 import", text, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(text)):
        absolute = isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "kdfast" for alias in node.names)
        if absolute or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdfast"):
            raise ValueError(f"{module} imports kdfast in a form that is not rewritten")
    return text


def init() -> str:
    """Return the source of the package's ``__init__.py``."""
    lines = [f"from .{module} import {', '.join(names)}" for module, names in ENTRIES.items()]
    public = sorted(name for names in ENTRIES.values() for name in names)
    return "\n".join(
        ['"""Losses of knowledge distillation; copied from kdfast."""', "", *lines, "", f"__all__ = {public}\n"]
    )


def write(folder: Path) -> None:
    """Write the folder, in place of what its build folder held."""
    build = folder / "build" / "torch-universal"
    shutil.rmtree(build, ignore_errors=True)
    files = {f"{PACKAGE}/__init__.py": init(), "__init__.py": f"from .{PACKAGE} import *\n"}
    for module in closure():
        is_package = ROOT.joinpath("kdfast", *module.split(".")).is_dir()
        name = module.replace(".", "/") + ("/__init__.py" if is_package else ".py")
        files[f"{PACKAGE}/{name}"] = rewrite(module, is_package)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    namespace = f"{PACKAGE}_{digest}"
    metadata = {
        "name": PACKAGE.replace("_", "-"), "id": f"_{namespace}", "version": 1, "license": "apache-2.0",
        "python-depends": [], "backend": {"type": "cuda"},  # required; the name of the folder lets all others load it
    }  # fmt: skip
    files["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    for name, text in files.items():
        path = build / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("NAMESPACE::", f"{namespace}::"))
    (folder / "README.md").write_text(README)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    print(f"wrote {len(files)} files to {build}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it")
    write(parser.parse_args().folder)
