// What the operators take, on every device.
#pragma once

namespace fastalign {

enum class Type : int { float32, float16, bfloat16 };

}  // namespace fastalign
