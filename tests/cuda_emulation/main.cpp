// Runs the CUDA kernels of csrc on the operands of each request.
#include <cmath>
#include <limits>

#include "emulator.h"
#include "grad_norms/grad_norms.h"
#include "requests.h"
#include "softmax_head/softmax_head.h"

namespace {

using namespace kdfast;

grad_norms::Convolution read_convolution(Request& request) {
  grad_norms::Convolution args{};
  args.a = request.array<const float>();
  args.b = request.array<const float>();
  request.fill(args.a_strides);
  request.fill(args.b_strides);
  for (int64_t* size :
       {&args.batch, &args.channels, &args.height, &args.width, &args.outputs, &args.out_height, &args.out_width})
    *size = request.integer();
  request.fill(args.kernel);
  request.fill(args.stride);
  request.fill(args.dilation);
  request.fill(args.pad);
  args.groups = request.integer();
  args.algorithm = static_cast<int>(request.integer());
  return args;
}

// An empty array of weights is left out.
void squared_norms(Request& request) {
  grad_norms::Convolution args = read_convolution(request);
  args.weights = request.array<const float>();
  std::vector<double> parts(static_cast<size_t>(args.batch * grad_norms::parts(args)),
                            std::numeric_limits<double>::quiet_NaN());
  args.out = parts.data();
  grad_norms::squared_norms_cuda(args, nullptr);
  respond(parts.data(), parts.size() * sizeof(double));
}

void sums_of_squares(Request& request) {
  grad_norms::Convolution args = read_convolution(request);
  const int64_t size = args.outputs * (args.channels / args.groups) * args.kernel[0] * args.kernel[1];
  std::vector<double> parts(static_cast<size_t>(grad_norms::squares_parts(args) * size));
  args.squares = parts.data();
  grad_norms::squared_norms_cuda(args, nullptr);
  respond(parts.data(), parts.size() * sizeof(double));
}

softmax_head::Logits read_logits(Request& request) {
  softmax_head::Logits logits{};
  logits.data = request.array<const void>();
  logits.rows = request.integer();
  logits.classes = request.integer();
  logits.stride = request.integer();
  logits.is_double = request.integer();
  logits.alpha = request.real();
  logits.temperature = request.real();
  return logits;
}

// The arrays that the kernel fills come last; an empty one is left out.
void residuals(Request& request) {
  softmax_head::Residuals args{};
  args.logits = read_logits(request);
  args.labels = request.array<const int64_t>();
  args.teacher = request.array<const void>();
  args.teacher_stride = request.integer();
  args.features = request.array<const void>();
  args.width = request.integer();
  args.features_stride = request.integer();
  args.extra = request.real();
  args.residuals = request.array<void>();
  args.norms = request.array<void>();
  softmax_head::compute_residuals_cuda(args, nullptr);
  respond(request.arrays[4].data(), request.arrays[4].size());
  respond(request.arrays[5].data(), request.arrays[5].size());
}

void curvature(Request& request) {
  softmax_head::Curvature args{};
  args.logits = read_logits(request);
  args.products = request.array<void>();
  args.vectors = request.integer();
  softmax_head::apply_curvature_cuda(args, nullptr);
  respond(request.arrays[1].data(), request.arrays[1].size());
}

}  // namespace

int main() try {
  Request request;
  while (read_request(request)) {
    emulation::seed(static_cast<uint32_t>(request.integer()));
    if (request.name == "squared_norms") {
      squared_norms(request);
    } else if (request.name == "sums_of_squares") {
      sums_of_squares(request);
    } else if (request.name == "residuals") {
      residuals(request);
    } else {
      curvature(request);
    }
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 4;
}
