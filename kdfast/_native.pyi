"""Types of the compiled extension. Addresses come from ``Tensor.data_ptr()``; strides count elements."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

_Matrix = tuple[int, int, int, int, int, int]
_Vector = tuple[int, int]
_Logits = tuple[int, int, int, int, bool, float, float, int, int]

cuda: bool
"""Whether the CUDA kernels were built."""

def isa() -> str: ...

# kd_loss
def kd_loss(
    logits: _Matrix,
    teacher: _Matrix,
    labels: _Vector,
    rows: _Vector,
    topk: tuple[int, int],
    weights: int,
    terms: tuple[bool, bool, bool, float, float, float],
    numbers: tuple[int, int, float, bool],
    divergence: tuple[int, float, float],
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    grad_scale: float,
    outputs: tuple[int, int, int, int],
    threads: int,
    isa_limit: int,
    /,
) -> None: ...
def scale_rows(
    grad: int,
    out: int,
    dtype: int,
    rows: int,
    cols: int,
    factor: _Vector,
    scale: float,
    threads: int,
    /,
) -> None: ...
def init_torch_handles(
    *,
    tensor_type: type,
    parameter_type: type,
    scalar: Tensor,
    empty_like: Callable[..., Any],
    is_grad_enabled: Callable[[], bool],
    transforms_active: Callable[[], bool],
    dispatch_mode_count: Callable[[], int],
    tracing_state: Callable[[], object],
    new_gradient: Callable[[Tensor, tuple[int, ...]], Tensor],
) -> None: ...
def fast_kd_loss(
    logits: Any,
    labels: Any,
    teacher: Any,
    rows: Any,
    alpha: Any,
    temperature: Any,
    t_squared: Any,
    ignore_index: Any,
    reduction: Any,
    direction: Any,
    backend: Any,
    divergence: Any,
    jsd_beta: Any,
    dkd_weights: Any,
    label_smoothing: Any,
    threads: int,
    /,
) -> tuple[Tensor, Tensor | None] | None: ...

# Per-sample gradient norms
class Convolution:
    def __init__(
        self,
        inputs: int,
        input_strides: Sequence[int],
        output_grads: int,
        output_grad_strides: Sequence[int],
        sizes: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        pad: Sequence[int],
        groups: int,
        algorithm: int,
        weights: int,
        squares: int,
        /,
    ) -> None: ...

def conv_squared_norms(convolution: Convolution, out: int, threads: int, isa_limit: int, /) -> None: ...
def conv_squared_norms_parts(convolution: Convolution, /) -> int: ...
def conv_sums_of_squares_parts(convolution: Convolution, /) -> int: ...
def conv_squared_norms_cuda(convolution: Convolution, out: int, stream: int, /) -> None: ...

# Softmax head
def head_residuals(
    head: _Logits,
    labels: int,
    teacher: int,
    teacher_stride: int,
    features: int,
    width: int,
    features_stride: int,
    extra: float,
    residuals: int,
    norms: int,
    stream: int,
    /,
) -> None: ...
def head_curvature(head: _Logits, products: int, vectors: int, stride: int, stream: int, /) -> None: ...
def head_products_fit(product_count: int, width: int, /) -> bool: ...
def head_products(
    head: _Logits,
    features: int,
    width: int,
    features_stride: int,
    bias: bool,
    v: int,
    vectors: int,
    scale: float,
    out: int,
    /,
) -> None: ...

# Views and permutations
def gather_views(
    images: int,
    rows: int,
    view_ids: int,
    scale: int,
    bias: int,
    count: int,
    batch: int,
    height: int,
    width: int,
    pad: int,
    flip: bool,
    out: int,
    dtype: int,
    threads: int,
    isa_limit: int,
    /,
) -> None: ...
def crop_views(
    images: int,
    rows: int,
    boxes: int,
    scale: int,
    bias: int,
    count: int,
    batch: int,
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    out: int,
    dtype: int,
    threads: int,
    isa_limit: int,
    /,
) -> None: ...
def shuffled_at(position: int, size: int, keys: int, count: int, out: int, threads: int, /) -> None: ...
