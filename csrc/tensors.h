// What a tensor of the stable ABI is to a kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "types.h"

namespace fastalign {

inline Type type_of(const torch::stable::Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Type::float32;
    case torch::headeronly::ScalarType::Half: return Type::float16;
    case torch::headeronly::ScalarType::BFloat16: return Type::bfloat16;
    default: STD_TORCH_CHECK(false, "the compiled kernels take float32, float16 and bfloat16");
  }
}

}  // namespace fastalign
