// The kernels for avx2, fma, f16c.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define FASTALIGN_ISA avx2
#define FASTALIGN_LANES 8
#define FASTALIGN_ISA_NAME "avx2"
#include "rows.h"

namespace fastalign {
const Kernels avx2_kernels = avx2::table;
}
#endif
