// As many floats as a register holds, and rows of three types as such lanes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace fastalign {
namespace FASTALIGN_ISA {

constexpr int64_t kLanes = FASTALIGN_LANES;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Floats every(float x) { return x - Floats{}; }

inline float sum(Floats x) {
  float parts[kLanes];
  std::memcpy(parts, &x, sizeof(parts));
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  return parts[0];
}

inline float largest(Floats x) {
  float parts[kLanes], found = 0.0f;
  std::memcpy(parts, &x, sizeof(parts));
  for (int i = 0; i < kLanes; i++) found = parts[i] > found ? parts[i] : found;
  return found;
}

inline Floats magnitude(Floats x) { return bits_of<Floats>(bits_of<Words>(x) & 0x7fffffffu); }

inline Floats load(const float* x) {
  Floats lanes;
  std::memcpy(&lanes, x, sizeof(lanes));
  return lanes;
}

inline void store(float* y, Floats x) { std::memcpy(y, &x, sizeof(x)); }

inline Floats load(const Brain* x) {
  Halves bits;
  std::memcpy(&bits, x, sizeof(bits));
  return bits_of<Floats>(__builtin_convertvector(bits, Words) << 16);
}

// Rounds to nearest even; NaN keeps its sign and becomes quiet.
inline void store(Brain* y, Floats x) {
  Words bits = bits_of<Words>(x);
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Words quiet = (bits >> 16) | 0x40u;
  Ints ordered = x == x;
  Words chosen = (rounded & bits_of<Words>(ordered)) | (quiet & ~bits_of<Words>(ordered));
  Halves narrow = __builtin_convertvector(chosen, Halves);
  std::memcpy(y, &narrow, sizeof(narrow));
}

#if defined(__F16C__)
inline Floats load(const Half* x) {
  Floats lanes;
  for (int i = 0; i < kLanes / 8; i++) {
    __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i)));
    std::memcpy(reinterpret_cast<float*>(&lanes) + 8 * i, &part, sizeof(part));
  }
  return lanes;
}

inline void store(Half* y, Floats x) {
  for (int i = 0; i < kLanes / 8; i++) {
    __m256 part;
    std::memcpy(&part, reinterpret_cast<const float*>(&x) + 8 * i, sizeof(part));
    __m128i bits = _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(y + 8 * i, &bits, sizeof(bits));
  }
}
#else
// Normal numbers by their bits; subnormal ones by a product that the float unit rounds.
inline Floats load(const Half* x) {
  Halves bits;
  std::memcpy(&bits, x, sizeof(bits));
  Words wide = __builtin_convertvector(bits, Words);
  Words sign = (wide & 0x8000u) << 16, rest = (wide & 0x7fffu) << 13;
  Floats scaled = bits_of<Floats>(rest) * every(0x1p112f);
  Words whole = bits_of<Words>(scaled);
  Ints special = rest >= 0x0f800000u;
  whole |= bits_of<Words>(special) & 0x7f800000u;
  return bits_of<Floats>(whole | sign);
}

inline void store(Half* y, Floats x) {
  Words bits = bits_of<Words>(x);
  Words sign = (bits >> 16) & 0x8000u;
  Floats size = magnitude(x);
  Words whole = bits_of<Words>(size);
  // From 2^-14 on: rounded by an integer, which may carry into the exponent and to infinity.
  Words normal = (whole - 0x38000000u + 0xfffu + ((whole >> 13) & 1u)) >> 13;
  // Below, adding 1/2 leaves the units of 2^-24 in the last bits, rounded to nearest even.
  Words small = bits_of<Words>(size + every(0.5f)) - 0x3f000000u;
  Ints is_small = whole < 0x38800000u;
  Ints is_huge = whole >= 0x47800000u, is_nan = whole > 0x7f800000u;
  Words chosen = (small & bits_of<Words>(is_small)) | (normal & ~bits_of<Words>(is_small));
  chosen = (bits_of<Words>(is_huge) & 0x7c00u) | (chosen & ~bits_of<Words>(is_huge));
  chosen |= bits_of<Words>(is_nan) & 0x200u;
  Halves narrow = __builtin_convertvector(chosen | sign, Halves);
  std::memcpy(y, &narrow, sizeof(narrow));
}
#endif

// The last lanes of a row whose length is no multiple: absent ones are 0.
template <class T>
inline Floats load(const T* x, int64_t count) {
  if (count >= kLanes) return load(x);
  T padded[kLanes] = {};
  std::memcpy(padded, x, sizeof(T) * count);
  return load(static_cast<const T*>(padded));
}

template <class T>
inline void store(T* y, Floats x, int64_t count) {
  if (count >= kLanes) return store(y, x);
  T padded[kLanes];
  store(static_cast<T*>(padded), x);
  std::memcpy(y, padded, sizeof(T) * count);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
