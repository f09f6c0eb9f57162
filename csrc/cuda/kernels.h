// What the CUDA kernels offer to ops.cpp: raw rows, on a stream. n > 0 rows of d numbers.
#pragma once

#include <cstdint>

#include "../types.h"

namespace fastalign {
namespace cuda {

constexpr int64_t kMaxRow = 16384;  // numbers of a row that fit the registers of a block
constexpr int64_t kPartials = 512;  // blocks that share the rows of a (d,) w: enough to fill a GPU

// Contiguous rows, beginning at any address.
struct Matrix {
  Type type;
  const void* data;
};

// y = |h| / |w h| w h, (n, d) in the type of h. w is (d,) with `shared`, of the type of h or float32.
void launch_hadamard_fwd(Matrix h, Matrix w, void* y, int64_t n, int64_t d, bool shared, void* stream);

// dh (n, d) in the type of h; dw in the type of w where it is not null. With `shared` dw is float32,
// (blocks, d): a sum over the rows of each of `blocks` blocks.
void launch_hadamard_bwd(const void* dy, Matrix h, Matrix w, void* dh, void* dw, int64_t n, int64_t d, bool shared,
                  int64_t blocks, void* stream);

// 1 / |x| of the rows, float32 (n,); 0 where |x| < 1e-18.
void launch_inverse_norms(Matrix x, float* inverse, int64_t n, int64_t d, void* stream);

#ifdef FASTALIGN_EMULATED
// Whether the threads of a block take their turns from the last one on.
void reverse(bool reversed);
#else
// Why nothing of this runs here: "", or a reason.
const char* obstacle();
#endif

}  // namespace cuda
}  // namespace fastalign
