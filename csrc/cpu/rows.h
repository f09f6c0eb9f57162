// Row kernels over lanes; see kernels.h for what each computes. Included once per instruction set.
#pragma once

#include "lanes.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// Two sums of squares, and <dy, u>, of a row; four accumulators each, so that sums stay short.
struct Sums {
  float h, u, dyu;
};

template <class H, class W, bool kGradient>
inline Sums row_sums(const H* dy, const H* h, const W* w, float h_scale, float u_scale, int64_t d) {
  Floats hh[4] = {}, uu[4] = {}, dyu[4] = {};
  Floats by_h = every(h_scale), by_u = every(u_scale);
  for (int64_t i = 0, k = 0; i < d; i += kLanes, k = (k + 1) % 4) {
    Floats x = load(h + i, d - i), u = load(w + i, d - i) * x;
    if (kGradient) dyu[k] += load(dy + i, d - i) * (u * by_u);
    x *= by_h;
    u *= by_u;
    hh[k] += x * x;
    uu[k] += u * u;
  }
  auto total = [](const Floats(&x)[4]) { return sum((x[0] + x[1]) + (x[2] + x[3])); };
  return {total(hh), total(uu), kGradient ? total(dyu) : 0.0f};
}

// A power of two that brings the largest magnitude of a row into 1..2; 1 for a row of 0.
inline float scale_of(float largest) {
  if (!(largest > 0.0f) || largest > 3e38f) return 1.0f;
  int exponent;
  __builtin_frexpf(largest, &exponent);
  return __builtin_ldexpf(1.0f, exponent > 126 ? -126 : exponent < -125 ? 126 : 1 - exponent);
}

// |h|, |u| and <dy, u> / |u|, where squares may leave the range of a float.
struct Norms {
  double h, u, q;
};

template <class H, class W, bool kGradient>
inline Norms norms(const H* dy, const H* h, const W* w, int64_t d) {
  Sums s = row_sums<H, W, kGradient>(dy, h, w, 1.0f, 1.0f, d);
  auto safe = [](float x) { return x > 1e-24f && x < 1e30f; };
  float h_scale = 1.0f, u_scale = 1.0f;
  if (!safe(s.h) || !safe(s.u)) {
    Floats top_h = {}, top_u = {};
    for (int64_t i = 0; i < d; i += kLanes) {
      Floats x = load(h + i, d - i), u = magnitude(load(w + i, d - i) * x);
      x = magnitude(x);
      top_h = x > top_h ? x : top_h;
      top_u = u > top_u ? u : top_u;
    }
    h_scale = scale_of(largest(top_h));
    u_scale = scale_of(largest(top_u));
    s = row_sums<H, W, kGradient>(dy, h, w, h_scale, u_scale, d);
  }
  double h_root = __builtin_sqrt(s.h), u_root = __builtin_sqrt(s.u);
  return {h_root / h_scale, u_root / u_scale, u_root == 0.0 ? 0.0 : s.dyu / u_root};
}

// 0 for a zero row; NaN is not 0, so that it stays in its row.
inline float ratio(double x, double norm) { return norm == 0.0 ? 0.0f : static_cast<float>(x / norm); }

template <class H, class W>
void hadamard_fwd(const H* h, const W* w, H* y, int64_t d) {
  Norms n = norms<H, W, false>(nullptr, h, w, d);
  Floats s = every(ratio(n.h, n.u));
  for (int64_t i = 0; i < d; i += kLanes)
    store(y + i, s * (load(w + i, d - i) * load(h + i, d - i)), d - i);
}

template <class H, class W>
void hadamard_bwd(const H* dy, const H* h, const W* w, H* dh, void* dw, bool add, int64_t d) {
  Norms n = norms<H, W, true>(dy, h, w, d);
  Floats s = every(ratio(n.h, n.u)), c = every(ratio(n.q, n.u)), r = every(ratio(n.q, n.h));
  for (int64_t i = 0; i < d; i += kLanes) {
    Floats x = load(h + i, d - i), by = load(w + i, d - i);
    Floats t = s * (load(dy + i, d - i) - c * (by * x));
    store(dh + i, r * x + by * t, d - i);
    if (dw == nullptr) continue;
    if (add) {
      float* total = static_cast<float*>(dw) + i;
      store(total, load(total, d - i) + x * t, d - i);
    } else {
      store(static_cast<W*>(dw) + i, x * t, d - i);
    }
  }
}

template <class X, class S>
void calibrate_fwd(const X* x, const S* scale, const S* shift, X* y, int64_t d) {
  for (int64_t i = 0; i < d; i += kLanes)
    store(y + i, load(scale + i, d - i) * load(x + i, d - i) + load(shift + i, d - i), d - i);
}

template <class X, class S>
void calibrate_bwd(const X* dy, const X* x, const S* scale, X* dx, float* dscale, float* dshift, int64_t d) {
  for (int64_t i = 0; i < d; i += kLanes) {
    Floats g = load(dy + i, d - i);
    store(dx + i, load(scale + i, d - i) * g, d - i);
    store(dscale + i, load(dscale + i, d - i) + load(x + i, d - i) * g, d - i);
    store(dshift + i, load(dshift + i, d - i) + g, d - i);
  }
}

template <class A, class B>
float dot(const A* a, const B* b, int64_t d) {
  Floats parts[4] = {};
  for (int64_t i = 0, k = 0; i < d; i += kLanes, k = (k + 1) % 4)
    parts[k] += load(a + i, d - i) * load(b + i, d - i);
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

template <class T>
void scaled(float factor, const T* x, T* y, int64_t d) {
  for (int64_t i = 0; i < d; i += kLanes) store(y + i, every(factor) * load(x + i, d - i), d - i);
}

template <class T>
void add_scaled(float factor, const T* x, float* total, int64_t d) {
  for (int64_t i = 0; i < d; i += kLanes)
    store(total + i, load(total + i, d - i) + every(factor) * load(x + i, d - i), d - i);
}

template <class T>
void narrow(const float* x, T* y, int64_t d) {
  for (int64_t i = 0; i < d; i += kLanes) store(y + i, load(x + i, d - i), d - i);
}

// Products of bfloat16 numbers are exact; lanes of 64 products are added in float64.
inline double squares(const Brain* x, int64_t d) {
  double total = 0.0;
  for (int64_t start = 0; start < d; start += 64 * kLanes) {
    int64_t count = d - start < 64 * kLanes ? d - start : 64 * kLanes;
    Floats parts[4] = {};
    for (int64_t i = 0, k = 0; i < count; i += kLanes, k = (k + 1) % 4) {
      Floats lanes = load(x + start + i, count - i);
      parts[k] += lanes * lanes;
    }
    total += sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
  return total;
}

inline void take_radial(const float* p, const Brain* h, Brain* dh, float inverse, float factor, int64_t d) {
  float t = inverse == 0.0f ? 0.0f : dot(p, h, d) * inverse * inverse;
  Floats by = every(factor), radial = every(t);
  for (int64_t i = 0; i < d; i += kLanes)
    store(dh + i, by * (load(p + i, d - i) - radial * load(h + i, d - i)), d - i);
}

// From a type known at run time to one known to the compiler: `call(pointer of that type)`.
template <class Call>
inline void typed(Type type, Call call) {
  switch (type) {
    case Type::float32: return call(static_cast<float*>(nullptr));
    case Type::float16: return call(static_cast<Half*>(nullptr));
    case Type::bfloat16: return call(static_cast<Brain*>(nullptr));
  }
}

template <class Call>
inline void typed(Type first, Type second, Call call) {
  typed(first, [&](auto* a) { typed(second, [&](auto* b) { call(a, b); }); });
}

template <class T>
inline const T* as(const T*, const void* x) { return static_cast<const T*>(x); }
template <class T>
inline T* as(const T*, void* x) { return static_cast<T*>(x); }

constexpr Kernels table = {
    FASTALIGN_ISA_NAME,
    [](Type h_type, Type w_type, const void* h, const void* w, void* y, int64_t d) {
      typed(h_type, w_type, [&](auto* a, auto* b) { hadamard_fwd(as(a, h), as(b, w), as(a, y), d); });
    },
    [](Type h_type, Type w_type, const void* dy, const void* h, const void* w, void* dh, void* dw, bool add,
       int64_t d) {
      typed(h_type, w_type, [&](auto* a, auto* b) {
        hadamard_bwd(as(a, dy), as(a, h), as(b, w), as(a, dh), dw, add, d);
      });
    },
    [](Type x_type, Type s_type, const void* x, const void* scale, const void* shift, void* y, int64_t d) {
      typed(x_type, s_type, [&](auto* a, auto* b) {
        calibrate_fwd(as(a, x), as(b, scale), as(b, shift), as(a, y), d);
      });
    },
    [](Type x_type, Type s_type, const void* dy, const void* x, const void* scale, void* dx, float* dscale,
       float* dshift, int64_t d) {
      typed(x_type, s_type, [&](auto* a, auto* b) {
        calibrate_bwd(as(a, dy), as(a, x), as(b, scale), as(a, dx), dscale, dshift, d);
      });
    },
    [](Type type, const void* a, const void* b, int64_t d) {
      float result = 0.0f;
      typed(type, [&](auto* t) { result = dot(as(t, a), as(t, b), d); });
      return result;
    },
    [](Type type, float factor, const void* x, void* y, int64_t d) {
      typed(type, [&](auto* t) { scaled(factor, as(t, x), as(t, y), d); });
    },
    [](Type type, float factor, const void* x, float* total, int64_t d) {
      typed(type, [&](auto* t) { add_scaled(factor, as(t, x), total, d); });
    },
    [](Type type, const float* x, void* y, int64_t d) {
      typed(type, [&](auto* t) { narrow(x, as(t, y), d); });
    },
    [](const uint16_t* x, int64_t d) { return squares(reinterpret_cast<const Brain*>(x), d); },
    [](const float* p, const uint16_t* h, uint16_t* dh, float inverse, float factor, int64_t d) {
      take_radial(p, reinterpret_cast<const Brain*>(h), reinterpret_cast<Brain*>(dh), inverse, factor, d);
    },
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
