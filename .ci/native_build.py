"""pytest plugin: test another build of the extension, the file in `KDFAST_NATIVE_BUILD`; see sanitize.sh."""

import importlib.util
import os
import sys

import torch  # noqa: F401  (loads the OpenMP runtime, which the kernels look up)

import kdfast

spec = importlib.util.spec_from_file_location("kdfast._native", os.environ["KDFAST_NATIVE_BUILD"])
kdfast._native = sys.modules["kdfast._native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kdfast._native)
