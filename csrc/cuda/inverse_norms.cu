// Inverse norms of rows, one block a row, and what a machine must have for any kernel here.
#include "kernels.h"
#include "rows.cuh"

namespace fastalign {
namespace cuda {
namespace {

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) inverse_norms_of(const T* x, float* inverse, int64_t n, int d) {
  Part<T, kPacket<T>, kAligned> part;
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
    part.load(x + row * d, d);
    float squares[1] = {0.0f}, largest[1] = {0.0f}, scale = 1.0f;
#pragma unroll
    for (int i = 0; i < kNumbers; i++) squares[0] += part[i] * part[i];
    over_block<Sum>(squares);
    if (!is_plain(squares[0])) {
#pragma unroll
      for (int i = 0; i < kNumbers; i++) largest[0] = fmaxf(largest[0], fabsf(part[i]));
      over_block<Largest>(largest);
      scale = power_below(largest[0]);
      const float by = 1.0f / scale;
      squares[0] = 0.0f;
#pragma unroll
      for (int i = 0; i < kNumbers; i++) squares[0] += (part[i] * by) * (part[i] * by);
      over_block<Sum>(squares);
    }
    const float norm = scale * __fsqrt_rn(squares[0]);
    if (threadIdx.x == 0) inverse[row] = norm < 1e-18f ? 0.0f : __fdiv_rn(1.0f, norm);
  }
}

template <class T>
void run(const void* x, float* inverse, int64_t n, int64_t d, void* stream) {
  const bool aligned = d % kPacket<T> == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  auto* kernel = aligned ? inverse_norms_of<T, true> : inverse_norms_of<T, false>;
  launch(kernel, blocks_of(n), threads_of(d), stream, static_cast<const T*>(x), inverse, n, d);
}

}  // namespace

void launch_inverse_norms(Matrix x, float* inverse, int64_t n, int64_t d, void* stream) {
  switch (x.type) {
    case Type::float32: return run<float>(x.data, inverse, n, d, stream);
    case Type::float16: return run<__half>(x.data, inverse, n, d, stream);
    case Type::bfloat16: return run<__nv_bfloat16>(x.data, inverse, n, d, stream);
  }
}

#ifdef __CUDACC__
const char* obstacle() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is installed";
  if (driver / 1000 < CUDART_VERSION / 1000) return "the NVIDIA driver is older than the CUDA that they were built with";
  return "";
}
#else
void reverse(bool reversed) { Emulation::one().reversed = reversed; }
#endif

}  // namespace cuda
}  // namespace fastalign
