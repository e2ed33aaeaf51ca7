"""Sphinx configuration: `make docs` builds the site into docs/_build."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import kdfast

project = "kdfast"
author = "the kdfast authors"
copyright = author
version = release = kdfast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "cli_reference", "docstrings"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = f"kdfast {version}"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("npt.ArrayLike", "IntArray", "FloatArray", "Float32Array", "Pixels")}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style"), ("Sources", "notes_style")]
napoleon_use_rtype = False
