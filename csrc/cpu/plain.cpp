// The kernels for any machine.
#define FASTALIGN_ISA plain
#define FASTALIGN_LANES 4
#define FASTALIGN_ISA_NAME "plain"
#include "rows.h"

namespace fastalign {
const Kernels plain_kernels = plain::table;
}
