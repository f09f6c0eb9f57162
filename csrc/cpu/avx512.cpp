// The kernels for avx512f, avx512bw, avx512vl, avx512dq, avx2, fma, f16c.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define FASTALIGN_ISA avx512
#define FASTALIGN_LANES 16
#define FASTALIGN_ISA_NAME "avx512"
#include "rows.h"

namespace fastalign {
const Kernels avx512_kernels = avx512::table;
}
#endif
