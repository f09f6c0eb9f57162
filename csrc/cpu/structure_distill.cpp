// Structure distillation of bfloat16 rows: half of the symmetric difference, then one product.
//
//   R = S_h - S_g,  S_h[i, j] = <h_i, h_j> / (|h_i| |h_j|)         loss = |R|^2 / n^2
//   p = R h^,  h^_i = h_i / |h_i|                                  dh_i = f (p_i - <p_i, h^_i> h^_i) / |h_i|
//
// Products of bfloat16 numbers are exact in float32, so S is as exact as float32 sums of them. In the
// second product R, times the norms of its columns, is the sum of two bfloat16 numbers: it keeps 16
// bits. Tiles of 64 by 64 on and above the diagonal; each adds its squares in float64, and tiles are
// added in their order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gram.h"
#include "kernels.h"

namespace fastalign {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Keep : int64_t { kNothing, kMatrix };

constexpr int64_t kPackedBytes = 32 << 20;  // of images that are packed at a time

// Not initialised, unlike std::vector's.
template <class T>
std::unique_ptr<T[]> buffer(int64_t size) { return std::unique_ptr<T[]>(new T[std::max<int64_t>(size, 1)]); }

int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

template <class Body>
void parallel(int64_t count, const Body& body) {
  if (count > 0)
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) body(i);
    });
}

// Rows as the products read them, of an even width, and 1 / |x| of each. A copy where the width is
// odd, or where the norm of a row is beyond what float32 squares and the instruction, which takes
// subnormal numbers for 0: that row times a power of two; or where pairs would not be aligned. Without `cosine` the rows as they are.
class Factor {
 public:
  Factor(const Tensor& x, bool cosine) : rows(x.size(0)), given_width(x.size(1)), width(given_width + (given_width & 1)) {
    given = data = static_cast<const uint16_t*>(x.data_ptr());
    inverse = buffer<float>(rows);
    if (given_width != width || reinterpret_cast<uintptr_t>(given) % sizeof(uint32_t)) make_copy();
    std::fill(inverse.get(), inverse.get() + rows, 1.0f);
    if (!cosine) return;
    parallel(blocks_of(rows), [&](int64_t block) {
      for (int64_t i = block * kBlock; i < std::min(rows, (block + 1) * kBlock); i++) inverse[i] = inverse_norm(i);
    });
    for (int64_t i = 0; i < rows; i++)
      if (!(inverse[i] > 1e-15f && inverse[i] < 1e15f)) scale(i);
  }
  const uint16_t* row(int64_t i) const { return data + i * width; }
  const uint32_t* pairs(int64_t i) const { return reinterpret_cast<const uint32_t*>(row(i)); }
  // 1 / |x| of the row that was given.
  double given_inverse(int64_t i) const { return power.empty() ? inverse[i] : std::ldexp(inverse[i], power[i]); }

  int64_t rows, given_width, width;
  std::unique_ptr<float[]> inverse;  // of the rows of `data`

 private:
  float inverse_norm(int64_t i) const {
    double sum = kernels().squares(row(i), width);
    return sum == 0.0 ? 0.0f : static_cast<float>(1.0 / std::sqrt(sum));
  }

  void make_copy() {
    copy = buffer<uint16_t>(rows * width);
    for (int64_t i = 0; i < rows; i++) {
      std::copy(given + i * given_width, given + (i + 1) * given_width, copy.get() + i * width);
      if (width != given_width) copy[i * width + given_width] = 0;
    }
    data = copy.get();
  }

  void scale(int64_t i) {
    uint16_t largest = 0;  // in their order the bits of magnitudes are those of integers
    for (int64_t k = 0; k < width; k++) largest = std::max<uint16_t>(largest, row(i)[k] & 0x7fff);
    if (largest == 0) return;
    if (largest >= 0x7f80) {  // infinity or NaN
      inverse[i] = std::nanf("");
      return;
    }
    if (!copy) make_copy();
    if (power.empty()) power.resize(rows);
    uint16_t* x = copy.get() + i * width;
    power[i] = -std::ilogb(number(largest));
    for (int64_t k = 0; k < width; k++) x[k] = top_half(std::ldexp(number(x[k]), power[i]));
    inverse[i] = inverse_norm(i);
  }

  static float number(uint16_t bits) {
    uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &whole, sizeof(x));
    return x;
  }

  static uint16_t top_half(float x) {
    uint32_t whole;
    std::memcpy(&whole, &x, sizeof(x));
    return whole >> 16;
  }

  const uint16_t *given, *data;
  std::unique_ptr<uint16_t[]> copy;
  std::vector<int> power;  // of the factor that a row of the copy has
};

struct Image {
  int64_t number, first, rows;
};

std::vector<Image> images_of(const std::optional<Tensor>& cu_seqlens, int64_t images, int64_t longest, int64_t rows) {
  auto offset = [&](int64_t at) -> int64_t {
    if (!cu_seqlens.has_value()) return at * longest;
    if (cu_seqlens->scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(cu_seqlens->data_ptr())[at];
    return static_cast<const int64_t*>(cu_seqlens->data_ptr())[at];
  };
  if (cu_seqlens.has_value())
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int || cu_seqlens->scalar_type() == ScalarType::Long,
                    "cu_seqlens must be int32 or int64");
  STD_TORCH_CHECK(!cu_seqlens.has_value() || cu_seqlens->numel() == images + 1, "cu_seqlens must hold b + 1 offsets");
  STD_TORCH_CHECK(offset(0) == 0 && offset(images) == rows, "cu_seqlens must rise from 0 to ", rows, ", the number of rows");
  std::vector<Image> found;
  for (int64_t i = 0; i < images; i++) {
    int64_t first = offset(i), last = offset(i + 1);
    STD_TORCH_CHECK(first <= last, "cu_seqlens must rise from 0 to ", rows, ", the number of rows");
    STD_TORCH_CHECK(last - first <= longest, "max_seqlen must be at least ", last - first, ": got ", longest);
    if (last > first) found.push_back({i, first, last - first});
  }
  return found;
}

// Images whose packed rows lie in memory together.
template <class Body>
void by_groups(const std::vector<Image>& images, int64_t bytes_per_row, const Body& body) {
  for (size_t first = 0; first < images.size();) {
    size_t last = first;
    for (int64_t bytes = 0; last < images.size() && (last == first || bytes < kPackedBytes); last++)
      bytes += images[last].rows * bytes_per_row;
    body(std::vector<Image>(images.begin() + first, images.begin() + last));
    first = last;
  }
}

struct Tile {
  int64_t image, row, column;  // of the first entry, within the image
};

std::tuple<Tensor, Tensor, Tensor, Tensor> structure_distill_fwd(
    Tensor student, Tensor teacher, std::optional<Tensor> cu_seqlens, int64_t images, int64_t longest, bool cosine,
    std::string negatives, int64_t keep) {
  const GramKernels* gram = gram_kernels();
  STD_TORCH_CHECK(gram != nullptr, "this processor has no products of bfloat16 matrices");
  STD_TORCH_CHECK(student.scalar_type() == ScalarType::BFloat16 && teacher.scalar_type() == ScalarType::BFloat16,
                  "student and teacher must be bfloat16");
  STD_TORCH_CHECK(keep == kNothing || keep == kMatrix, "keep must be 0 or 1");
  student = contiguous(student), teacher = contiguous(teacher);
  if (cu_seqlens.has_value()) cu_seqlens = contiguous(*cu_seqlens);
  int64_t rows = student.size(0);
  Tensor losses = torch::stable::new_zeros(student, {images}, ScalarType::Float);
  Tensor factor = torch::stable::new_zeros(student, {images}, ScalarType::Float);
  Tensor residuals = torch::stable::new_empty(student, {keep == kMatrix ? rows : 0, keep == kMatrix ? longest : 0}, ScalarType::Float);
  Tensor nothing = torch::stable::new_empty(student, {0}, ScalarType::Float);
  float* kept = keep == kMatrix ? static_cast<float*>(residuals.data_ptr()) : nullptr;
  const bool clip = negatives == "clip", clip_teacher = clip || negatives == "clip_teacher";
  Factor h(student, cosine), g(teacher, cosine);
  by_groups(images_of(cu_seqlens, images, longest, rows), 2 * (h.width + g.width), [&](const std::vector<Image>& group) {
    struct Block { int64_t image, row, at; };
    std::vector<Block> blocks;
    std::vector<Tile> tiles;
    std::vector<int64_t> first_block, first_tile;
    for (size_t i = 0; i < group.size(); i++) {
      first_block.push_back(blocks.size());
      first_tile.push_back(tiles.size());
      for (int64_t c = 0; c < group[i].rows; c += kBlock) {
        blocks.push_back({static_cast<int64_t>(i), c, 0});
        for (int64_t r = 0; r <= c; r += kBlock) tiles.push_back({static_cast<int64_t>(i), r, c});
      }
    }
    first_tile.push_back(tiles.size());
    const int64_t h_size = h.width / 2 * kBlock, g_size = g.width / 2 * kBlock;
    auto packed = buffer<uint32_t>(blocks.size() * (h_size + g_size));
    parallel(blocks.size(), [&](int64_t b) {
      const Image& image = group[blocks[b].image];
      int64_t row = image.first + blocks[b].row, count = std::min(kBlock, image.rows - blocks[b].row);
      uint32_t* to = packed.get() + b * (h_size + g_size);
      gram->pack_rows(h.row(row), h.width, count, h.width, to);
      gram->pack_rows(g.row(row), g.width, count, g.width, to + h_size);
    });
    auto sums = buffer<double>(tiles.size());
    parallel(tiles.size(), [&](int64_t at) {
      const Tile& tile = tiles[at];
      const Image& image = group[tile.image];
      int64_t count = std::min(kBlock, image.rows - tile.row), columns = std::min(kBlock, image.rows - tile.column);
      const uint32_t* right = packed.get() + (first_block[tile.image] + tile.column / kBlock) * (h_size + g_size);
      alignas(64) float s[kBlock * kBlock], t[kBlock * kBlock];
      int64_t row = image.first + tile.row, column = image.first + tile.column;
      gram->product(h.pairs(row), h.width / 2, count, right, h.width / 2, s);
      gram->product(g.pairs(row), g.width / 2, count, right + h_size, g.width / 2, t);
      Sides sides{&h.inverse[row], &h.inverse[column], &g.inverse[row], &g.inverse[column]};
      sums[at] = gram->residual(s, t, count, columns, sides, tile.row == tile.column, cosine, clip, clip_teacher);
      if (kept == nullptr) return;
      for (int64_t i = 0; i < count; i++)
        std::copy(s + i * kBlock, s + i * kBlock + columns, kept + (row + i) * longest + tile.column);
      if (tile.row == tile.column) return;
      gram->transpose(s, count, columns, t);
      for (int64_t j = 0; j < columns; j++)
        std::copy(t + j * kBlock, t + j * kBlock + count, kept + (column + j) * longest + tile.row);
    });
    for (size_t i = 0; i < group.size(); i++) {
      double total = 0.0, n = static_cast<double>(group[i].rows);
      for (int64_t at = first_tile[i]; at < first_tile[i + 1]; at++) total += sums[at];
      static_cast<float*>(losses.data_ptr())[group[i].number] = static_cast<float>(total / (n * n));
      static_cast<float*>(factor.data_ptr())[group[i].number] = static_cast<float>(4.0 / (n * n));
    }
  });
  return {losses, residuals, nothing, factor};
}

Tensor structure_distill_bwd(Tensor dlosses, Tensor student, Tensor residuals, Tensor, Tensor factor,
                             std::optional<Tensor> cu_seqlens, int64_t longest, bool cosine) {
  const GramKernels* gram = gram_kernels();
  STD_TORCH_CHECK(gram != nullptr, "this processor has no products of bfloat16 matrices");
  dlosses = contiguous(dlosses), student = contiguous(student), residuals = contiguous(residuals), factor = contiguous(factor);
  if (cu_seqlens.has_value()) cu_seqlens = contiguous(*cu_seqlens);
  Tensor dh = torch::stable::empty_like(student);
  const int64_t d = student.size(1), columns = blocks_of(d), width = columns * kBlock;
  uint16_t* out = static_cast<uint16_t*>(dh.data_ptr());
  const float *kept = static_cast<const float*>(residuals.data_ptr()), *up = static_cast<const float*>(dlosses.data_ptr());
  const float* factors = static_cast<const float*>(factor.data_ptr());
  Factor h(student, cosine);
  auto images = images_of(cu_seqlens, dlosses.size(0), longest, h.rows);
  by_groups(images, 2 * width, [&](const std::vector<Image>& group) {
    struct Task { int64_t image, at; };
    std::vector<Task> packs, rows;
    std::vector<int64_t> first;
    int64_t size = 0;
    for (size_t i = 0; i < group.size(); i++) {
      first.push_back(size);
      size += (group[i].rows + 1) / 2 * width;
      for (int64_t c = 0; c < columns; c++) packs.push_back({static_cast<int64_t>(i), c});
      for (int64_t r = 0; r < group[i].rows; r += kBlock) rows.push_back({static_cast<int64_t>(i), r});
    }
    auto packed = buffer<uint32_t>(size);
    parallel(packs.size(), [&](int64_t p) {
      const Image& image = group[packs[p].image];
      int64_t column = packs[p].at * kBlock;
      gram->pack_columns(h.row(image.first) + column, h.width, image.rows, std::min(kBlock, d - column),
                         packed.get() + first[packs[p].image] + packs[p].at * kBlock * ((image.rows + 1) / 2));
    });
    parallel(rows.size(), [&](int64_t task) {
      const Image& image = group[rows[task].image];
      int64_t row = rows[task].at, count = std::min(kBlock, image.rows - row), pairs = (image.rows + 1) / 2;
      auto high = buffer<uint32_t>(count * pairs), low = buffer<uint32_t>(count * pairs);
      for (int64_t i = 0; i < count; i++)
        gram->split(kept + (image.first + row + i) * longest, &h.inverse[image.first], image.rows,
                    reinterpret_cast<uint16_t*>(high.get() + i * pairs), reinterpret_cast<uint16_t*>(low.get() + i * pairs));
      auto product = buffer<float>(count * width);
      for (int64_t c = 0; c < columns; c++) {
        alignas(64) float block[kBlock * kBlock];
        gram->product_of_two(high.get(), low.get(), pairs, count,
                             packed.get() + first[rows[task].image] + c * kBlock * pairs, pairs, block);
        for (int64_t i = 0; i < count; i++) std::copy(block + i * kBlock, block + (i + 1) * kBlock, product.get() + i * width + c * kBlock);
      }
      float scale = up[image.number] * factors[image.number];
      for (int64_t i = 0; i < count; i++) {
        int64_t at = image.first + row + i;
        kernels().take_radial(product.get() + i * width, h.row(at), out + at * d, cosine ? h.inverse[at] : 0.0f,
                              static_cast<float>(scale * h.given_inverse(at)), d);
      }
    });
  });
  return dh;
}

bool has_structure_distill() { return gram_kernels() != nullptr; }

}  // namespace
}  // namespace fastalign

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign, m) {
  m.def(
      "structure_distill_fwd.native(Tensor student, Tensor teacher, Tensor? cu_seqlens, SymInt images, SymInt longest, "
      "bool cosine, str negatives, int keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "structure_distill_bwd.native(Tensor dlosses, Tensor student, Tensor residual, Tensor t, Tensor factor, "
      "Tensor? cu_seqlens, SymInt longest, bool cosine) -> Tensor");
  m.def("native_has_structure_distill() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CPU, m) {
  m.impl("structure_distill_fwd.native", TORCH_BOX(&fastalign::structure_distill_fwd));
  m.impl("structure_distill_bwd.native", TORCH_BOX(&fastalign::structure_distill_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CompositeExplicitAutograd, m) {
  m.impl("native_has_structure_distill", TORCH_BOX(&fastalign::has_structure_distill));
}
