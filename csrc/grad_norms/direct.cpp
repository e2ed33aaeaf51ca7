// Norms from per-sample weight gradients G = sum_t b_t a_t^T: G is accumulated in register tiles, one window of
// positions at a time, and then squared.
#include <algorithm>

#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"
#include "grad_norms/panels.h"

namespace kdfast::grad_norms {
namespace {

class Direct final : public NormAlgorithm {
 public:
  explicit Direct(const Convolution& args)
      : a_(args),
        panels_(args),
        loops_(vector_loops(args.isa_limit)),
        tiles_(panels_.blocks * kTileRows * panels_.kernel_rows * panels_.kernel_columns * panels_.width) {}

  int64_t scratch_size() const override {
    return tiles_ + panels_.gradients_size() + panels_.images_size() + panels_.spare_size();
  }

  int64_t work() const override {
    return a_.out_height * a_.out_width * a_.kernel[0] * a_.kernel[1] * panels_.channels * panels_.blocks * kTileRows *
           a_.groups;
  }

  double squared_norm(int64_t sample, float* scratch) const override {
    float *tiles = scratch, *gradients = tiles + tiles_, *images = gradients + panels_.gradients_size();
    double total = 0;
    for (int64_t group = 0; group < a_.groups; ++group) {
      for (int64_t i = 0; i < panels_.windows(); ++i) {
        const Window window = panels_.window(i);
        panels_.pack_gradients(sample, group, window, gradients);
        panels_.pack_images(sample, group, window, images, images + panels_.images_size());
        multiply(gradients, images, window, tiles, i > 0);
      }
      total += loops_.sum_of_squares(tiles, tiles_);
    }
    return total;
  }

 private:
  void multiply(const float* gradients, const float* images, const Window& window, float* tiles, bool add) const {
    const int64_t width = panels_.width, blocks = panels_.blocks;
    for (int64_t start = 0; start < width; start += kTileWidth) {
      const int vectors = static_cast<int>(std::min(kTileVectors, (width - start) / kLanes));
      for (int64_t ky = 0; ky < panels_.kernel_rows; ++ky) {
        for (int64_t kx = 0; kx < panels_.kernel_columns; ++kx) {
          const Panel right = panels_.right(images, ky, kx, start);
          for (int64_t block = 0; block < blocks; ++block) {
            float* out = tiles + (((ky * panels_.kernel_columns + kx) * blocks + block) * kTileRows) * width + start;
            loops_.multiply(vectors, panels_.left(gradients, block), right, window.rows, window.columns, out, width,
                            add);
          }
        }
      }
    }
  }

  const Convolution& a_;
  const Panels panels_;
  const VectorLoops& loops_;
  const int64_t tiles_;  // floats in all tiles of G
};

}  // namespace

std::unique_ptr<NormAlgorithm> make_direct(const Convolution& args) { return std::make_unique<Direct>(args); }

}  // namespace kdfast::grad_norms
