// Row operations of a softmax head on a GPU: one block of threads per row, one warp per vector. softmax_head.h has the
// formulas; residuals.cpp and sample_lanes.h explain the order of the operations.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "softmax_head/softmax_head.h"

namespace kdfast::softmax_head {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Combines the lanes of a warp in a fixed order, so that the result has the same bits every time, and returns it in all
// lanes.
template <class T, class Combine>
__device__ T over_warp(T x, Combine combine) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// The same for a block of whole warps. `shared` has room for one value per warp.
template <class T, class Combine>
__device__ T over_block(T x, Combine combine, T* shared) {
  x = over_warp(x, combine);
  const int warps = blockDim.x / kWarp;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < warps; ++i) x = combine(x, shared[i]);
  return x;
}

// The softmax of a row: probability j is exp((z[j] - top) inv_t) * factor.
template <class T>
struct Softmax {
  const T* z;
  T top, inv_t, factor;
  __device__ T term(int64_t j) const { return exp((z[j] - top) * inv_t); }
  __device__ T operator()(int64_t j) const { return term(j) * factor; }
};

template <class T>
__device__ Softmax<T> softmax_of(const T* z, int64_t n, T inv_t, T* shared) {
  T top = -static_cast<T>(INFINITY), total = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) top = Largest{}(z[j], top);
  Softmax<T> softmax{z, over_block(top, Largest{}, shared), inv_t, 0};
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) total += softmax.term(j);
  softmax.factor = 1 / over_block(total, Plus{}, shared);
  return softmax;
}

template <class T>
__global__ void residual_kernel(Residuals a) {
  __shared__ T shared[kWarp];
  __shared__ double wide[kWarp];
  const Logits& h = a.logits;
  const int64_t row = blockIdx.x, n = h.classes;
  const T* z = static_cast<const T*>(h.data) + row * h.stride;
  const bool hard = h.alpha < 1, soft = h.alpha > 0;
  const int64_t label = hard ? a.labels[row] : -1;
  const T inv_t = static_cast<T>(1 / h.temperature);
  const T ce_factor = static_cast<T>(1 - h.alpha), kl_factor = static_cast<T>(h.alpha * h.temperature);
  Softmax<T> p{}, p_soft{}, q{};
  T own = 0;
  if (hard) {
    p = softmax_of(z, n, T{1}, shared);
    T others = 0;
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) others += j == label ? T{0} : p(j);
    own = -over_block(others, Plus{}, shared);
  }
  if (soft) {
    p_soft = softmax_of(z, n, inv_t, shared);
    q = softmax_of(static_cast<const T*>(a.teacher) + row * a.teacher_stride, n, inv_t, shared);
  }
  double square = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    T r = 0;
    if (hard) r = ce_factor * (j == label ? own : p(j));
    if (soft) r += kl_factor * (p_soft(j) - q(j));
    if (a.residuals) static_cast<T*>(a.residuals)[row * n + j] = r;
    square += static_cast<double>(r) * static_cast<double>(r);
  }
  if (!a.norms) return;
  square = over_block(square, Plus{}, wide);
  if (a.features) {
    const T* x = static_cast<const T*>(a.features) + row * a.features_stride;
    double length = 0;
    for (int64_t j = threadIdx.x; j < a.width; j += blockDim.x)
      length += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    square *= a.extra + over_block(length, Plus{}, wide);
  }
  if (threadIdx.x == 0) static_cast<T*>(a.norms)[row] = static_cast<T>(sqrt(square));
}

template <class T>
__global__ void curvature_kernel(Curvature a) {
  __shared__ T shared[kWarp];
  __shared__ double class_shared[kWarp];
  const Logits& h = a.logits;
  const int64_t row = blockIdx.x, n = h.classes;
  const T* z = static_cast<const T*>(h.data) + row * h.stride;
  const bool hard = h.alpha < 1, soft = h.alpha > 0;
  const Softmax<T> p = hard ? softmax_of(z, n, T{1}, shared) : Softmax<T>{};
  const Softmax<T> p_soft = soft ? softmax_of(z, n, static_cast<T>(1 / h.temperature), shared) : Softmax<T>{};
  const T top = hard ? p.top : p_soft.top;
  double last = 0;  // the last of the most probable classes; a double represents any index exactly
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) last = z[j] == top ? static_cast<double>(j) : last;
  const int64_t top_class = static_cast<int64_t>(over_block(last, Largest{}, class_shared));
  const T ce_factor = static_cast<T>(1 - h.alpha), kl_factor = static_cast<T>(h.alpha);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int64_t k = threadIdx.x / kWarp; k < a.vectors; k += warps) {
    T* v = static_cast<T*>(a.products) + (row * a.vectors + k) * n;
    const T shift = v[top_class];
    __syncwarp();  // before a lane overwrites v[top_class] below
    T mean = 0, mean_soft = 0;
    for (int64_t j = lane; j < n; j += kWarp) {
      if (hard) mean += p(j) * (v[j] - shift);
      if (soft) mean_soft += p_soft(j) * (v[j] - shift);
    }
    mean = over_warp(mean, Plus{});
    mean_soft = over_warp(mean_soft, Plus{});
    for (int64_t j = lane; j < n; j += kWarp) {
      const T x = v[j] - shift;
      T out = 0;
      if (hard) out = ce_factor * p(j) * (x - mean);
      if (soft) out += kl_factor * p_soft(j) * (x - mean_soft);
      v[j] = out;
    }
  }
}

void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Threads per block: one warp for every 32 numbers of a row or for every vector, at most eight.
unsigned threads_for(int64_t numbers, int64_t vectors) {
  const int64_t warps = std::max((numbers + kWarp - 1) / kWarp, vectors);
  return static_cast<unsigned>(std::min<int64_t>(8, std::max<int64_t>(1, warps)) * kWarp);
}

void check_rows(const Logits& h) {
  if (h.rows > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("too many rows for one launch");
}

}  // namespace

void compute_residuals_cuda(const Residuals& args, void* stream) {
  const Logits& h = args.logits;
  check_rows(h);
  if (h.rows == 0) return;
  const unsigned threads = threads_for(std::max(h.classes, args.features ? args.width / 4 : 0), 1);
  const auto kernel = h.is_double ? residual_kernel<double> : residual_kernel<float>;
  kernel<<<static_cast<unsigned>(h.rows), threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check_launch("residuals of a softmax head");
}

void apply_curvature_cuda(const Curvature& args, void* stream) {
  const Logits& h = args.logits;
  check_rows(h);
  if (h.rows == 0 || args.vectors == 0) return;
  const unsigned threads = threads_for(1, args.vectors);
  const auto kernel = h.is_double ? curvature_kernel<double> : curvature_kernel<float>;
  kernel<<<static_cast<unsigned>(h.rows), threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check_launch("curvature of a softmax head");
}

}  // namespace kdfast::softmax_head
