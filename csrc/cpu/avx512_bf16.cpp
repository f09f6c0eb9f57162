// Products of bfloat16 matrices for avx512_bf16.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#include <immintrin.h>

#include <cstring>

#include "gram.h"

namespace fastalign {
namespace avx512_bf16 {

constexpr int64_t kDepth = 256;  // pairs that are worked on at a time: 64 KiB of the right factor

inline __m512 product_add(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// kRows by 64 sums stay in registers.
template <int kRows, bool kTwo>
inline void micro(const uint32_t* high, const uint32_t* low, int64_t stride, const uint32_t* packed, int64_t pairs,
                  float* c) {
  __m512 sums[kRows][4];
  for (int i = 0; i < kRows; i++)
    for (int j = 0; j < 4; j++) sums[i][j] = _mm512_loadu_ps(c + i * kBlock + 16 * j);
  for (int64_t k = 0; k < pairs; k++) {
    __m512i b[4];
    for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(packed + k * kBlock + 16 * j);
    for (int i = 0; i < kRows; i++) {
      __m512i a = _mm512_set1_epi32(static_cast<int>(high[i * stride + k]));
      for (int j = 0; j < 4; j++) sums[i][j] = product_add(sums[i][j], a, b[j]);
      if (kTwo) {
        a = _mm512_set1_epi32(static_cast<int>(low[i * stride + k]));
        for (int j = 0; j < 4; j++) sums[i][j] = product_add(sums[i][j], a, b[j]);
      }
    }
  }
  for (int i = 0; i < kRows; i++)
    for (int j = 0; j < 4; j++) _mm512_storeu_ps(c + i * kBlock + 16 * j, sums[i][j]);
}

template <bool kTwo>
void product(const uint32_t* high, const uint32_t* low, int64_t stride, int64_t rows, const uint32_t* packed,
             int64_t pairs, float* c) {
  std::memset(c, 0, sizeof(float) * rows * kBlock);
  for (int64_t k = 0; k < pairs; k += kDepth) {
    int64_t depth = pairs - k < kDepth ? pairs - k : kDepth;
    const uint32_t* b = packed + k * kBlock;
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6)
      micro<6, kTwo>(high + i * stride + k, kTwo ? low + i * stride + k : nullptr, stride, b, depth, c + i * kBlock);
    for (; i + 2 <= rows; i += 2)
      micro<2, kTwo>(high + i * stride + k, kTwo ? low + i * stride + k : nullptr, stride, b, depth, c + i * kBlock);
    for (; i < rows; i++)
      micro<1, kTwo>(high + i * stride + k, kTwo ? low + i * stride + k : nullptr, stride, b, depth, c + i * kBlock);
  }
}

void pack_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t width, uint32_t* out) {
  // 16 rows by 16 pairs at a time, transposed by four steps of interleaving.
  int64_t pairs = width / 2;
  for (int64_t r = 0; r < kBlock; r += 16) {
    for (int64_t k = 0; k < pairs; k += 16) {
      __mmask16 some = pairs - k < 16 ? static_cast<__mmask16>((1u << (pairs - k)) - 1) : 0xffff;
      __m512i v[16], t[16];
      for (int i = 0; i < 16; i++)
        v[i] = r + i < rows ? _mm512_maskz_loadu_epi32(some, x + (r + i) * stride + 2 * k) : _mm512_setzero_si512();
      for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
      }
      for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
      // v[4 g + j], lane l: pair 4 l + j of rows 4 g .. 4 g + 3.
      for (int j = 0; j < 4; j++) {
        __m512i low01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), high01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
        __m512i low23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
        __m512i high23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
      }
      for (int i = 0; i < 16 && k + i < pairs; i++) _mm512_storeu_si512(out + (k + i) * kBlock + r, t[i]);
    }
  }
}

void pack_columns(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, uint32_t* out) {
  for (int64_t k = 0; k < rows; k += 2, out += kBlock) {
    const uint16_t* first = x + k * stride;
    for (int64_t c = 0; c < kBlock; c += 16) {
      int64_t left = columns - c;
      __mmask16 some = left >= 16 ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
      __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, first + c));
      __m512i b = k + 1 < rows ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, first + stride + c))
                               : _mm512_setzero_si512();
      _mm512_storeu_si512(out + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
}

void split(const float* x, const float* factor, int64_t count, uint16_t* high, uint16_t* low) {
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 some = count - i < 16 ? static_cast<__mmask16>((1u << (count - i)) - 1) : 0xffff;
    __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), _mm512_maskz_loadu_ps(some, factor + i));
    __m256i top = (__m256i)_mm512_cvtneps_pbh(value);
    __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(top), 16)));
    __m256i rest_bits = (__m256i)_mm512_cvtneps_pbh(rest);
    int64_t even = count - i + (count & 1);
    __mmask16 kept = even < 16 ? static_cast<__mmask16>((1u << even) - 1) : 0xffff;
    _mm256_mask_storeu_epi16(high + i, kept, top);
    _mm256_mask_storeu_epi16(low + i, kept, rest_bits);
  }
}

double residual(float* s, const float* t, int64_t rows, int64_t columns, const Sides& sides, bool diagonal,
                bool cosine, bool clip, bool clip_teacher) {
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  double total = 0.0;
  for (int64_t i = 0; i < rows; i++) {
    const __m512 h = _mm512_set1_ps(sides.h_rows[i]), g = _mm512_set1_ps(sides.g_rows[i]);
    __m512 sum = zero;
    for (int64_t j = 0; j < columns; j += 16) {
      __mmask16 some = columns - j < 16 ? static_cast<__mmask16>((1u << (columns - j)) - 1) : 0xffff;
      __m512 a = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, s + i * kBlock + j),
                               _mm512_mul_ps(h, _mm512_maskz_loadu_ps(some, sides.h_columns + j)));
      __m512 b = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, t + i * kBlock + j),
                               _mm512_mul_ps(g, _mm512_maskz_loadu_ps(some, sides.g_columns + j)));
      __mmask16 above = some, on = 0;
      if (diagonal) {
        on = i >= j && i < j + 16 ? static_cast<__mmask16>(1u << (i - j)) & some : 0;
        above = i < j ? some : i >= j + 15 ? 0 : some & static_cast<__mmask16>(0xffffu << (i - j + 1));
      }
      if (cosine && on) {  // of a row with itself: exactly 1, or 0; NaN is not above 0
        a = _mm512_mask_mov_ps(a, _mm512_mask_cmp_ps_mask(on, a, zero, _CMP_GT_OQ), one);
        b = _mm512_mask_mov_ps(b, _mm512_mask_cmp_ps_mask(on, b, zero, _CMP_GT_OQ), one);
      }
      __mmask16 dropped = clip ? _mm512_cmp_ps_mask(a, zero, _CMP_LT_OQ) : 0;
      a = _mm512_mask_mov_ps(a, dropped, zero);
      if (clip_teacher) b = _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(b, zero, _CMP_LT_OQ), zero);
      __m512 difference = _mm512_sub_ps(a, b);
      sum = _mm512_mask3_fmadd_ps(difference, difference, sum, on);
      sum = _mm512_mask3_fmadd_ps(_mm512_add_ps(difference, difference), difference, sum, above);
      _mm512_mask_storeu_ps(s + i * kBlock + j, some, _mm512_mask_mov_ps(difference, dropped, zero));
    }
    total += static_cast<double>(_mm512_reduce_add_ps(sum));
  }
  return total;
}

void transpose(const float* x, int64_t rows, int64_t columns, float* out) {
  // Numbers of 32 bits are pairs of 16.
  pack_rows(reinterpret_cast<const uint16_t*>(x), 2 * kBlock, rows, 2 * columns, reinterpret_cast<uint32_t*>(out));
}

void product_of_one(const uint32_t* a, int64_t stride, int64_t rows, const uint32_t* packed, int64_t pairs, float* c) {
  product<false>(a, nullptr, stride, rows, packed, pairs, c);
}

}  // namespace avx512_bf16

const GramKernels avx512_bf16_gram = {
    avx512_bf16::pack_rows,  avx512_bf16::pack_columns, avx512_bf16::product_of_one,
    avx512_bf16::product<true>, avx512_bf16::split,     avx512_bf16::residual,
    avx512_bf16::transpose,
};

}  // namespace fastalign
#endif
