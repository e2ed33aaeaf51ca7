"""The compiled extension: its stub file, and what it is linked with."""

import ast
from pathlib import Path

from kdfast.ops.native import extension

CUDA_ONLY = {"conv_squared_norms_parts", "conv_squared_norms_cuda", "conv_sums_of_squares_parts"}


def stub_names():
    import kdfast

    tree = ast.parse((Path(kdfast.__file__).parent / "_native.pyi").read_text())
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}


def test_stub_lists_what_the_extension_offers():
    offered = {name for name in dir(extension) if not name.startswith("_")}
    assert offered | CUDA_ONLY == stub_names()
