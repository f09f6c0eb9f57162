// The choice of the instruction set.
#include "kernels.h"

#include "gram.h"

#include <torch/headeronly/util/Exception.h>

#include <string>

namespace fastalign {
namespace {

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &avx512_kernels,
    &avx2_kernels,
#endif
    &plain_kernels,
};

bool runs(const Kernels* kernels) {
#if defined(__x86_64__)
  if (kernels == &avx512_kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (kernels == &avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

const Kernels* best() {
  for (const Kernels* kernels : kAll)
    if (runs(kernels)) return kernels;
  return &plain_kernels;
}

const Kernels*& in_use() {
  static const Kernels* chosen = best();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *in_use(); }

const GramKernels* gram_kernels() {
#if defined(__x86_64__)
  static const bool has = runs(&avx512_kernels) && __builtin_cpu_supports("avx512bf16");
  return has && in_use() == &avx512_kernels ? &avx512_bf16_gram : nullptr;
#else
  return nullptr;
#endif
}

void use(const char* name) {
  if (!*name) return void(in_use() = best());
  for (const Kernels* kernels : kAll)
    if (std::string(kernels->name) == name) {
      STD_TORCH_CHECK(runs(kernels), "this processor has no ", name);
      in_use() = kernels;
      return;
    }
  STD_TORCH_CHECK(false, "no such instruction set: ", name);
}

}  // namespace fastalign
