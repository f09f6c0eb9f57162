// Operators on CUDA, by LibTorch's stable ABI: types, shapes, streams. The kernels are in *.cu.
//
// With FASTALIGN_EMULATED they are the overload `emulated`, on the CPU, for the tests.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../tensors.h"
#include "kernels.h"

#ifndef FASTALIGN_EMULATED
// Weak: a torch without CUDA has not this symbol, and loads the library all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastalign {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxBlocks = 0x7fffffff;

// The current stream of a tensor's device, which is the current device as long as this lives.
class Stream {
 public:
#ifdef FASTALIGN_EMULATED
  explicit Stream(const Tensor&) {}
#else
  explicit Stream(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &raw_) == 0, "no current stream");
  }
#endif
  operator void*() const { return raw_; }

 private:
#ifndef FASTALIGN_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* raw_ = nullptr;
};

Matrix matrix(const Tensor& x) { return {type_of(x), x.data_ptr()}; }

// Rows of contiguous `x`, of which each fits a block.
int64_t rows_of(const Tensor& x) {
  const int64_t d = x.size(-1);
  STD_TORCH_CHECK(d <= kMaxRow, "rows must have at most ", kMaxRow, " numbers: got ", d);
  return d ? x.numel() / d : 0;
}

// w as the kernels take it: in the type of h, or in float32.
Tensor beside(const Tensor& w, const Tensor& h) {
  type_of(w);
  return contiguous(w.scalar_type() == h.scalar_type() ? w : to(w, ScalarType::Float));
}

Tensor hadamard_fwd(Tensor h, Tensor w) {
  h = contiguous(h);
  const int64_t n = rows_of(h);
  const bool shared = w.dim() != h.dim();
  const Stream stream(h);
  w = beside(w, h);
  Tensor y = torch::stable::empty_like(h);
  if (n) launch_hadamard_fwd(matrix(h), matrix(w), y.data_ptr(), n, h.size(-1), shared, stream);
  return y;
}

std::tuple<Tensor, Tensor> hadamard_bwd(Tensor dy, Tensor h, Tensor w, bool needs_w) {
  dy = contiguous(dy), h = contiguous(h);
  const int64_t n = rows_of(h), d = h.size(-1);
  const bool shared = w.dim() != h.dim();
  const ScalarType w_type = w.scalar_type();
  const Stream stream(h);
  w = beside(w, h);
  Tensor dh = torch::stable::empty_like(h);
  if (!n) return {dh, needs_w ? torch::stable::new_zeros(w, w.sizes(), w_type) : torch::stable::new_empty(w, {0}, w_type)};
  const int64_t rows = shared && needs_w ? (n + kPartials - 1) / kPartials : (n + kMaxBlocks - 1) / kMaxBlocks;
  const int64_t blocks = (n + rows - 1) / rows;
  Tensor dw = !needs_w   ? torch::stable::new_empty(w, {0})
              : shared ? torch::stable::new_empty(w, {blocks, d}, ScalarType::Float)
                       : torch::stable::empty_like(w);
  launch_hadamard_bwd(dy.data_ptr(), matrix(h), matrix(w), dh.data_ptr(), needs_w ? dw.data_ptr() : nullptr, n, d,
                     shared, blocks, stream);
  if (needs_w && shared) {
    const int64_t over[] = {0};
    dw = torch::stable::sum(dw, over);
  }
  return {dh, dw.scalar_type() == w_type ? dw : to(dw, w_type)};
}

Tensor inverse_norms(Tensor x) {
  x = contiguous(x);
  const int64_t n = rows_of(x);
  const Stream stream(x);
  Tensor inverse = torch::stable::new_zeros(x, {x.size(0)}, ScalarType::Float);
  if (n) launch_inverse_norms(matrix(x), static_cast<float*>(inverse.data_ptr()), n, x.size(-1), stream);
  return inverse;
}

#ifndef FASTALIGN_EMULATED
std::string obstacle_now() { return obstacle(); }
#endif

}  // namespace
}  // namespace cuda
}  // namespace fastalign

#ifdef FASTALIGN_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(fastalign, m) {
  m.def("hadamard_reweight_fwd.emulated(Tensor h, Tensor w) -> Tensor");
  m.def("hadamard_reweight_bwd.emulated(Tensor dy, Tensor h, Tensor w, bool needs_w) -> (Tensor, Tensor)");
  m.def("inverse_norms.emulated(Tensor x) -> Tensor");
  m.def("emulation_reverse(bool reversed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CPU, m) {
  m.impl("hadamard_reweight_fwd.emulated", TORCH_BOX(&fastalign::cuda::hadamard_fwd));
  m.impl("hadamard_reweight_bwd.emulated", TORCH_BOX(&fastalign::cuda::hadamard_bwd));
  m.impl("inverse_norms.emulated", TORCH_BOX(&fastalign::cuda::inverse_norms));
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CompositeExplicitAutograd, m) {
  m.impl("emulation_reverse", TORCH_BOX(&fastalign::cuda::reverse));
}
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastalign, m) {
  m.def("inverse_norms.native(Tensor x) -> Tensor");
  m.def("native_cuda_obstacle() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CUDA, m) {
  m.impl("hadamard_reweight_fwd.native", TORCH_BOX(&fastalign::cuda::hadamard_fwd));
  m.impl("hadamard_reweight_bwd.native", TORCH_BOX(&fastalign::cuda::hadamard_bwd));
  m.impl("inverse_norms.native", TORCH_BOX(&fastalign::cuda::inverse_norms));
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CompositeExplicitAutograd, m) {
  m.impl("native_cuda_obstacle", TORCH_BOX(&fastalign::cuda::obstacle_now));
}
#endif
