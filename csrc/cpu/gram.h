// Products of bfloat16 matrices with float32 sums, in blocks of 64 columns.
//
// Both factors are read along the summed dimension in pairs, as the instruction takes them. The
// right one is packed first: for each block of 64 columns and each pair, 64 pairs side by side.
#pragma once

#include <cstdint>

namespace fastalign {

constexpr int64_t kBlock = 64;

// 1 / |x| of the rows and columns of a tile, of student and teacher.
struct Sides {
  const float *h_rows, *h_columns, *g_rows, *g_columns;
};

struct GramKernels {
  // Rows of x (rows <= 64, width even) as columns of the right factor: out (width / 2, 64) pairs.
  void (*pack_rows)(const uint16_t* x, int64_t stride, int64_t rows, int64_t width, uint32_t* out);

  // Columns of x (rows, columns <= 64) as those of the right factor, of ceil(rows / 2) pairs; a row
  // that is missing in the last pair is 0.
  void (*pack_columns)(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, uint32_t* out);

  // c (rows, 64) = a (rows, 2 pairs) times the packed block.
  void (*product)(const uint32_t* a, int64_t stride, int64_t rows, const uint32_t* packed, int64_t pairs,
                  float* c);

  // The same of the sum of two matrices a, both (rows, 2 pairs).
  void (*product_of_two)(const uint32_t* high, const uint32_t* low, int64_t stride, int64_t rows,
                         const uint32_t* packed, int64_t pairs, float* c);

  // x (count) times factor (count) as the sum of two bfloat16, each `count` rounded up to even.
  void (*split)(const float* x, const float* factor, int64_t count, uint16_t* high, uint16_t* low);

  // R of a tile (rows, 64) in place of the student's products s; t are the teacher's. Returns its
  // sum of squares, each entry above the diagonal twice and below it not at all.
  double (*residual)(float* s, const float* t, int64_t rows, int64_t columns, const Sides& sides, bool diagonal,
                     bool cosine, bool clip, bool clip_teacher);

  // x (rows, 64) of which `columns` count to (columns, 64).
  void (*transpose)(const float* x, int64_t rows, int64_t columns, float* out);
};

#if defined(__x86_64__)
extern const GramKernels avx512_bf16_gram;
#endif

// Null where the processor has no instruction for it.
const GramKernels* gram_kernels();

}  // namespace fastalign
