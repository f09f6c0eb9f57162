// Hadamard reweighting, one block a row, each input read once; the equations are in
// fastalign_kernels/hadamard_reweight.py.
#include "kernels.h"
#include "rows.cuh"

namespace fastalign {
namespace cuda {
namespace {

static_assert(kMaxThreads * kNumbers == kMaxRow, "a block holds a row");

// |h|, |u| and <dy, u> of a row.
struct Norms {
  float h, u, dyu;
};

template <class Gradient, class H, class W>
__device__ inline Norms norms(H& h, W& w, const Gradient& dy) {
  float sums[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kNumbers; i++) {
    const float u = w[i] * h[i];
    sums[0] += h[i] * h[i];
    sums[1] += u * u;
    sums[2] += dy[i] * u;
  }
  over_block<Sum>(sums);
  if (is_plain(sums[0]) && is_plain(sums[1])) return {__fsqrt_rn(sums[0]), __fsqrt_rn(sums[1]), sums[2]};
  h.keep_words(), w.keep_words();
  float largest[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kNumbers; i++) {
    largest[0] = fmaxf(largest[0], fabsf(h[i]));
    largest[1] = fmaxf(largest[1], fabsf(w[i] * h[i]));
  }
  over_block<Largest>(largest);
  h.keep_words(), w.keep_words();
  const float h_scale = power_below(largest[0]), u_scale = power_below(largest[1]);
  const float h_inverse = 1.0f / h_scale, u_inverse = 1.0f / u_scale;
  float squares[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kNumbers; i++) {
    const float a = h[i] * h_inverse, b = w[i] * h[i] * u_inverse;
    squares[0] += a * a;
    squares[1] += b * b;
  }
  over_block<Sum>(squares);
  return {h_scale * __fsqrt_rn(squares[0]), u_scale * __fsqrt_rn(squares[1]), sums[2]};
}

struct Nothing {
  __device__ float operator[](int) const { return 0.0f; }
};

// x / norm, and 0 for a zero row; NaN stays NaN.
__device__ inline float ratio(float x, float norm) { return norm == 0.0f ? 0.0f : __fdiv_rn(x, norm); }

template <class H, class W, bool kAligned, int kThreads>
__global__ void __launch_bounds__(kThreads) forward(const H* h, const W* w, H* y, int64_t n, int d, int64_t w_stride) {
  constexpr int kStep = kStepOf<H, W>;
  Part<H, kStep, kAligned> x;
  Part<W, kStep, kAligned> by;
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
    x.load(h + row * d, d);
    by.load(w + row * w_stride, d);
    const Norms norm = norms(x, by, Nothing());
    x.keep_words(), by.keep_words();
    const float s = ratio(norm.h, norm.u);
    float out[kNumbers];
#pragma unroll
    for (int i = 0; i < kNumbers; i++) out[i] = s * (by[i] * x[i]);
    store<H, kStep, kAligned>(y + row * d, d, out);
  }
}

// A block has the rows from blockIdx.x * rows on; with kShared it sums their dw.
template <class H, class W, class DW, bool kShared, bool kAligned, int kThreads>
__global__ void __launch_bounds__(kThreads)
    backward(const H* dy, const H* h, const W* w, H* dh, DW* dw, int64_t n, int d, int64_t rows) {
  constexpr int kStep = kStepOf<H, W>;
  Part<H, kStep, kAligned> x, up;
  Part<W, kStep, kAligned> by;
  float total[kNumbers] = {};
  const int64_t first = blockIdx.x * rows, last = first + rows < n ? first + rows : n;
  if (kShared) by.load(w, d);
  for (int64_t row = first; row < last; row++) {
    x.load(h + row * d, d);
    up.load(dy + row * d, d);
    if (!kShared) by.load(w + row * d, d);
    const Norms norm = norms(x, by, up);
    x.keep_words(), by.keep_words(), up.keep_words();
    const float q = ratio(norm.dyu, norm.u), s = ratio(norm.h, norm.u);
    const float of_u = ratio(q, norm.u), of_h = ratio(q, norm.h);
    float out[kNumbers];
#pragma unroll
    for (int i = 0; i < kNumbers; i++) {
      const float t = up[i] - of_u * (by[i] * x[i]);
      out[i] = of_h * x[i] + s * by[i] * t;
      if (kShared) total[i] += s * x[i] * t;
    }
    store<H, kStep, kAligned>(dh + row * d, d, out);
    if (!kShared && dw != nullptr) {
#pragma unroll
      for (int i = 0; i < kNumbers; i++) out[i] = s * x[i] * (up[i] - of_u * (by[i] * x[i]));
      store<DW, kStep, kAligned>(dw + row * d, d, out);
    }
  }
  if (kShared && dw != nullptr) store<DW, kStep, kAligned>(dw + static_cast<int64_t>(blockIdx.x) * d, d, total);
}

template <class H_, class W_, bool kAligned_, int kThreads_>
struct Case {
  using H = H_;
  using W = W_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kThreads_;
};

template <class H, class W, class Body>
void by_shape(int64_t d, std::initializer_list<const void*> pointers, const Body& body) {
  uintptr_t addresses = 0;
  for (const void* pointer : pointers) addresses |= reinterpret_cast<uintptr_t>(pointer);
  const bool aligned = d % kStepOf<H, W> == 0 && addresses % 16 == 0;
  // With fewer threads a thread has more registers.
  if (threads_of(d) > kMaxThreads / 2)
    aligned ? body(Case<H, W, true, kMaxThreads>()) : body(Case<H, W, false, kMaxThreads>());
  else
    aligned ? body(Case<H, W, true, kMaxThreads / 2>()) : body(Case<H, W, false, kMaxThreads / 2>());
}

// Calls `body` with the Case of these rows.
template <class Body>
void by_case(Type h, Type w, int64_t d, std::initializer_list<const void*> pointers, const Body& body) {
  if (h == Type::float32) return by_shape<float, float>(d, pointers, body);
  if (h == Type::float16)
    return w == h ? by_shape<__half, __half>(d, pointers, body) : by_shape<__half, float>(d, pointers, body);
  return w == h ? by_shape<__nv_bfloat16, __nv_bfloat16>(d, pointers, body)
                : by_shape<__nv_bfloat16, float>(d, pointers, body);
}

}  // namespace

void launch_hadamard_fwd(Matrix h, Matrix w, void* y, int64_t n, int64_t d, bool shared, void* stream) {
  by_case(h.type, w.type, d, {h.data, w.data, y}, [&](auto chosen) {
    using C = decltype(chosen);
    using H = typename C::H;
    using W = typename C::W;
    launch(forward<H, W, C::kAligned, C::kThreads>, blocks_of(n), threads_of(d), stream,
           static_cast<const H*>(h.data), static_cast<const W*>(w.data), static_cast<H*>(y), n, d, shared ? 0 : d);
  });
}

void launch_hadamard_bwd(const void* dy, Matrix h, Matrix w, void* dh, void* dw, int64_t n, int64_t d, bool shared,
                  int64_t blocks, void* stream) {
  by_case(h.type, w.type, d, {dy, h.data, w.data, dh, dw}, [&](auto chosen) {
    using C = decltype(chosen);
    using H = typename C::H;
    using W = typename C::W;
    auto run = [&](auto* kernel, auto* gradient) {
      launch(kernel, blocks_of(blocks), threads_of(d), stream, static_cast<const H*>(dy),
             static_cast<const H*>(h.data), static_cast<const W*>(w.data), static_cast<H*>(dh), gradient, n, d,
             (n + blocks - 1) / blocks);
    };
    if (shared)
      run(backward<H, W, float, true, C::kAligned, C::kThreads>, static_cast<float*>(dw));
    else
      run(backward<H, W, W, false, C::kAligned, C::kThreads>, static_cast<W*>(dw));
  });
}

}  // namespace cuda
}  // namespace fastalign
