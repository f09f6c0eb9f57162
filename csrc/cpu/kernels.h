// What each instruction set provides, and the one function that chooses among them.
//
// A kernel works on raw rows in one type and on one thread; ops.cpp divides the rows among threads.
// A unit is compiled for each instruction set from the same templates (rows.h, gram.h), in its own
// namespace and without the standard library: an inline function of it compiled for AVX-512 could be
// the one that the linker keeps for all.
#pragma once

#if defined(__clang__) || !defined(__GNUC__)
#error "the compiled kernels need GCC: set CXX to it, or install with build isolation, without them"
#endif

#include <cstdint>

#include "../types.h"

namespace fastalign {

// One row of h, w, u = w h. Shapes (d,).
struct Kernels {
  const char* name;

  // y = |h| / |u| u.
  void (*hadamard_fwd)(Type h_type, Type w_type, const void* h, const void* w, void* y, int64_t d);

  // dh, and dw where it is not null: in the type of w, or added to float32 with `add`.
  void (*hadamard_bwd)(Type h_type, Type w_type, const void* dy, const void* h, const void* w, void* dh,
                       void* dw, bool add, int64_t d);

  // y = scale x + shift.
  void (*calibrate_fwd)(Type x_type, Type scale_type, const void* x, const void* scale, const void* shift,
                        void* y, int64_t d);

  // dx = scale dy; dscale += x dy, dshift += dy, both float32.
  void (*calibrate_bwd)(Type x_type, Type scale_type, const void* dy, const void* x, const void* scale,
                        void* dx, float* dscale, float* dshift, int64_t d);

  // <a, b>.
  float (*dot)(Type type, const void* a, const void* b, int64_t d);

  // y = factor x.
  void (*scaled)(Type type, float factor, const void* x, void* y, int64_t d);

  // sum += factor x, float32.
  void (*add_scaled)(Type type, float factor, const void* x, float* sum, int64_t d);

  // y = x in another type.
  void (*narrow)(Type type, const float* x, void* y, int64_t d);

  // |x|^2 of a row of bfloat16.
  double (*squares)(const uint16_t* x, int64_t d);

  // dh = factor (p - <p, h^> h^) of a row of bfloat16, h^ = inverse h; all of p where inverse is 0.
  void (*take_radial)(const float* p, const uint16_t* h, uint16_t* dh, float inverse, float factor, int64_t d);
};

extern const Kernels plain_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The best that this machine has.
const Kernels& kernels();

// Another than the best, by name, for the tests; "" is the best again. Throws for one that this
// machine has not.
void use(const char* name);

}  // namespace fastalign
