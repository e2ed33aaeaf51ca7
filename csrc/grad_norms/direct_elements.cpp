// Functions of the elements of per-sample weight gradients G = sum_t b_t a_t^T: tiles of G are accumulated in registers
// and used while they are in the cache. A part is some blocks of outputs and a tile's width of inputs, at all offsets.
#include <algorithm>

#include "grad_norms/algorithms.h"
#include "grad_norms/loops.h"
#include "grad_norms/panels.h"

namespace kdfast::grad_norms {
namespace {

constexpr int64_t kMaxBlocks = 8;  // of a part: their tiles at one offset fit the L1 cache
constexpr int64_t kMinParts = 32;  // where there are enough blocks, so that threads have equal work

class DirectElements final : public ElementAlgorithm {
 public:
  explicit DirectElements(const Convolution& args) : a_(args), panels_(args), loops_(vector_loops(args.isa_limit)) {
    starts_ = (panels_.width + kTileWidth - 1) / kTileWidth;
    offsets_ = panels_.kernel_rows * panels_.kernel_columns;
    part_blocks_ = std::clamp<int64_t>(panels_.blocks * starts_ * a_.groups / kMinParts, 1, kMaxBlocks);
    slices_ = (panels_.blocks + part_blocks_ - 1) / part_blocks_;
    window_size_ = panels_.gradients_size() + round_up(panels_.images_size(), kLanes);
    plane_ = part_blocks_ * kTileRows * kTileWidth;
  }

  int64_t pieces() const override { return a_.groups * panels_.windows(); }
  int64_t packed_size() const override { return pieces() * window_size_; }
  int64_t parts() const override { return a_.groups * starts_ * slices_; }
  int64_t work() const override {
    return a_.out_height * a_.out_width * offsets_ * std::min(kTileWidth, panels_.width) * part_blocks_ * kTileRows;
  }
  // The tiles of G, their weights, and their squares.
  int64_t scratch_size() const override {
    return std::max(panels_.spare_size(), (tile_planes() + 2 * offsets_) * plane_);
  }

  void pack(int64_t sample, int64_t piece, float* packed, float* scratch) const override {
    const int64_t group = piece / panels_.windows();
    const Window window = panels_.window(piece % panels_.windows());
    float* to = packed + piece * window_size_;
    panels_.pack_gradients(sample, group, window, to);
    panels_.pack_images(sample, group, window, to + panels_.gradients_size(), scratch);
  }

  void evaluate(int64_t index, int64_t, int64_t count, const float* packed, int64_t stride, float* scratch,
                double* sums) const override {
    const Part part = find_part(index);
    float *tiles = scratch, *weights = tiles + tile_planes() * plane_, *squares = weights + offsets_ * plane_;
    if (a_.weights) {
      std::fill_n(weights, offsets_ * plane_, 0.0f);
      for_each_run(part, [&](int64_t at, int64_t element, int64_t step, int64_t size) {
        copy_strided(a_.weights + element, step, weights + at, size);
      });
    }
    if (a_.squares) std::fill_n(squares, offsets_ * plane_, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float* from = packed + i * stride + part.group * panels_.windows() * window_size_;
      sums[i] = sum(part, from, tiles, weights, squares);
    }
    if (a_.squares) {
      for_each_run(part, [&](int64_t at, int64_t element, int64_t step, int64_t size) {
        for (int64_t j = 0; j < size; ++j) a_.squares[element + j * step] += static_cast<double>(squares[at + j]);
      });
    }
  }

 private:
  struct Part {
    int64_t group, start, first_block, blocks;
    int vectors;
    int64_t width() const { return vectors * int64_t{kLanes}; }
    int64_t size() const { return blocks * kTileRows * width(); }  // of the tiles at one offset
  };

  Part find_part(int64_t index) const {
    const int64_t slice = index % slices_, start = index / slices_ % starts_ * kTileWidth;
    const int64_t block = slice * part_blocks_;
    return {index / slices_ / starts_, start, block, std::min(part_blocks_, panels_.blocks - block),
            static_cast<int>(std::min(kTileVectors, (panels_.width - start) / kLanes))};
  }

  // Planes of tiles at one offset: with several windows, all are kept until the last window.
  int64_t tile_planes() const { return panels_.windows() > 1 ? offsets_ : 1; }

  // The part's sum of weighted squares for one sample, whose squares are added.
  double sum(const Part& part, const float* packed, float* tiles, const float* weights, float* squares) const {
    const int64_t width = part.width(), last = panels_.windows() - 1;
    double total = 0;
    for (int64_t w = 0; w <= last; ++w, packed += window_size_) {
      const Window window = panels_.window(w);
      for (int64_t offset = 0; offset < offsets_; ++offset) {
        const int64_t ky = offset / panels_.kernel_columns, kx = offset % panels_.kernel_columns;
        const Panel right = panels_.right(packed + panels_.gradients_size(), ky, kx, part.start);
        float* out = last ? tiles + offset * plane_ : tiles;
        for (int64_t block = 0; block < part.blocks; ++block) {
          loops_.multiply(part.vectors, panels_.left(packed, part.first_block + block), right, window.rows,
                          window.columns, out + block * kTileRows * width, width, w > 0);
        }
        if (w < last) continue;
        if (a_.weights) total += loops_.weighted_squares(out, weights + offset * plane_, part.size());
        if (a_.squares) loops_.add_squares(out, squares + offset * plane_, part.size());
      }
    }
    return total;
  }

  // Calls visit(index in the part's planes, index in the weight, its step, size) for the runs of elements of the part.
  template <class Visit>
  void for_each_run(const Part& part, const Visit& visit) const {
    const int64_t offsets = a_.kernel[0] * a_.kernel[1], end = std::min(part.start + part.width(), panels_.inputs);
    for (int64_t row = 0; row < part.blocks * kTileRows; ++row) {
      const int64_t output = part.first_block * kTileRows + row, at = row * part.width();
      if (output >= panels_.outputs) break;
      const int64_t first = (part.group * panels_.outputs + output) * panels_.channels * offsets;
      for (int64_t offset = 0; offset < offsets; ++offset) {
        if (!panels_.unfold) {
          visit(offset * plane_ + at, first + part.start * offsets + offset, offsets, end - part.start);
          continue;
        }
        // A row of unfolded inputs has the channels of the first offset, then those of the next.
        const int64_t channel = std::max<int64_t>(part.start - offset * panels_.channels, 0);
        const int64_t input = offset * panels_.channels + channel;
        const int64_t size = std::min(panels_.channels - channel, end - input);
        if (size > 0) visit(at + input - part.start, first + channel * offsets + offset, offsets, size);
      }
    }
  }

  const Convolution& a_;
  const Panels panels_;
  const VectorLoops& loops_;
  int64_t starts_;       // tiles along the inputs
  int64_t offsets_;      // of tiles
  int64_t part_blocks_;  // maximal blocks of a part
  int64_t slices_;       // parts along the blocks
  int64_t window_size_;  // floats of a packed window and group
  int64_t plane_;        // floats of a part's tiles at one offset
};

}  // namespace

std::unique_ptr<ElementAlgorithm> make_direct_elements(const Convolution& args) {
  return std::make_unique<DirectElements>(args);
}

}  // namespace kdfast::grad_norms
