// Operators on the CPU, by LibTorch's stable ABI: types, shapes, threads. The rows are in rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace fastalign {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;   // numbers that are worth a thread
constexpr int64_t kPartials = 32;     // sums over rows that are added in the end, whatever the threads

int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// The numbers of a contiguous tensor by row.
struct Rows {
  Rows(const Tensor& x, int64_t width)
      : type(type_of(x)), data(static_cast<char*>(x.data_ptr())), stride(width * size_of(type)) {}
  void* operator[](int64_t row) const { return data + row * stride; }
  Type type;
  char* data;
  int64_t stride;
};

Tensor empty_rows(const Tensor& like, std::vector<int64_t> shape, std::optional<ScalarType> type = {}) {
  return torch::stable::new_empty(like, shape, type);
}

template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

int64_t grain_of(int64_t d) { return kGrain / std::max<int64_t>(d, 1) + 1; }

// Rows of part `i` of `parts`: the same for any number of threads.
std::pair<int64_t, int64_t> part(int64_t rows, int64_t parts, int64_t i) {
  return {rows * i / parts, rows * (i + 1) / parts};
}

// Sums of float32 partial rows (parts, d) in their order.
Tensor total(const Tensor& partial, int64_t parts, int64_t d, const Tensor& like) {
  float* first = static_cast<float*>(partial.data_ptr());
  const Kernels& k = kernels();
  for (int64_t i = 1; i < parts; i++) k.add_scaled(Type::float32, 1.0f, first + i * d, first, d);
  Tensor out = empty_rows(like, {d});
  k.narrow(type_of(like), first, out.data_ptr(), d);
  return out;
}

Tensor hadamard_fwd(Tensor h, Tensor w) {
  h = contiguous(h), w = contiguous(w);
  int64_t d = h.size(-1), n = d ? h.numel() / d : 0;
  Tensor y = torch::stable::empty_like(h);
  Rows from(h, d), by(w, w.dim() == h.dim() && n != 1 ? d : 0), to(y, d);
  if (w.dim() != h.dim()) by.stride = 0;
  const Kernels& k = kernels();
  parallel(n, grain_of(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) k.hadamard_fwd(from.type, by.type, from[i], by[i], to[i], d);
  });
  return y;
}

std::tuple<Tensor, Tensor> hadamard_bwd(Tensor dy, Tensor h, Tensor w, bool needs_w) {
  dy = contiguous(dy), h = contiguous(h), w = contiguous(w);
  int64_t d = h.size(-1), n = d ? h.numel() / d : 0;
  bool shared = w.dim() != h.dim();
  Tensor dh = torch::stable::empty_like(h);
  Rows up(dy, d), from(h, d), by(w, shared ? 0 : d), to(dh, d);
  const Kernels& k = kernels();
  if (!needs_w || !shared) {
    Tensor dw = needs_w ? torch::stable::empty_like(w) : empty_rows(w, {0});
    Rows to_w(dw, d);
    parallel(n, grain_of(d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        k.hadamard_bwd(from.type, by.type, up[i], from[i], by[i], to[i], needs_w ? to_w[i] : nullptr, false, d);
    });
    return {dh, dw};
  }
  int64_t parts = std::max<int64_t>(std::min(kPartials, n), 1);
  Tensor partial = torch::stable::new_zeros(w, {parts, d}, ScalarType::Float);
  float* sums = static_cast<float*>(partial.data_ptr());
  parallel(n ? parts : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      for (auto [i, last] = part(n, parts, p); i < last; i++)
        k.hadamard_bwd(from.type, by.type, up[i], from[i], by[i], to[i], sums + p * d, true, d);
  });
  return {dh, total(partial, parts, d, w)};
}

Tensor calibrate_fwd(Tensor x, Tensor vision_mask, Tensor scale, Tensor shift) {
  x = contiguous(x), vision_mask = contiguous(vision_mask), scale = contiguous(scale), shift = contiguous(shift);
  int64_t n = vision_mask.numel(), d = x.size(-1);
  Tensor y = torch::stable::empty_like(x);
  Rows from(x, d), to(y, d);
  Type type = type_of(scale);
  const bool* vision = static_cast<const bool*>(vision_mask.data_ptr());
  const void *u = scale.data_ptr(), *v = shift.data_ptr();
  const Kernels& k = kernels();
  parallel(d ? n : 0, grain_of(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      if (vision[i])
        k.calibrate_fwd(from.type, type, from[i], u, v, to[i], d);
      else
        std::memcpy(to[i], from[i], from.stride);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> calibrate_bwd(Tensor dy, Tensor x, Tensor vision_mask, Tensor scale) {
  dy = contiguous(dy), x = contiguous(x), vision_mask = contiguous(vision_mask), scale = contiguous(scale);
  int64_t n = vision_mask.numel(), d = x.size(-1), parts = std::max<int64_t>(std::min(kPartials, n), 1);
  Tensor dx = torch::stable::empty_like(x);
  Tensor partial = torch::stable::new_zeros(scale, {2, parts, d}, ScalarType::Float);
  Rows up(dy, d), from(x, d), to(dx, d);
  Type type = type_of(scale);
  const bool* vision = static_cast<const bool*>(vision_mask.data_ptr());
  const void* u = scale.data_ptr();
  float* sums = static_cast<float*>(partial.data_ptr());
  const Kernels& k = kernels();
  parallel(n && d ? parts : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      for (auto [i, last] = part(n, parts, p); i < last; i++)
        if (vision[i])
          k.calibrate_bwd(from.type, type, up[i], from[i], u, to[i], sums + p * d, sums + (parts + p) * d, d);
        else
          std::memcpy(to[i], up[i], up.stride);
  });
  Tensor dscale = total(torch::stable::select(partial, 0, 0), parts, d, scale);
  Tensor dshift = total(torch::stable::select(partial, 0, 1), parts, d, scale);
  return {dx, dscale, dshift};
}

int64_t label_of(const Tensor& labels, int64_t i) {
  if (labels.scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(labels.data_ptr())[i];
  return static_cast<const int64_t*>(labels.data_ptr())[i];
}

void check_labels(const Tensor& labels, int64_t v) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Int || labels.scalar_type() == ScalarType::Long,
                  "labels must be int32 or int64");
  for (int64_t i = 0; i < labels.numel(); i++)
    if (label_of(labels, i) >= v)
      throw std::out_of_range("labels must be below " + std::to_string(v) + ", the rows of weight: got " +
                              std::to_string(label_of(labels, i)) + "; negative ones are ignored");
}

Tensor label_logits_fwd(Tensor hidden, Tensor weight, Tensor labels, std::optional<Tensor> bias) {
  hidden = contiguous(hidden), weight = contiguous(weight), labels = contiguous(labels);
  if (bias.has_value()) bias = contiguous(*bias);
  check_labels(labels, weight.size(0));
  int64_t t = hidden.size(0), d = hidden.size(1);
  Tensor y = empty_rows(hidden, {t}, ScalarType::Float);
  float* out = static_cast<float*>(y.data_ptr());
  Rows rows(hidden, d), heads(weight, d);
  const Kernels& k = kernels();
  parallel(t, grain_of(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t label = label_of(labels, i);
      out[i] = label < 0 ? 0.0f : k.dot(rows.type, rows[i], heads[label], d);
      if (label >= 0 && bias.has_value()) k.add_scaled(rows.type, 1.0f, Rows(*bias, 1)[label], out + i, 1);
    }
  });
  return y;
}

Tensor label_logits_bwd_hidden(Tensor dy, Tensor weight, Tensor labels) {
  dy = contiguous(dy), weight = contiguous(weight), labels = contiguous(labels);
  check_labels(labels, weight.size(0));
  int64_t t = dy.numel(), d = weight.size(1);
  Tensor dhidden = empty_rows(weight, {t, d});
  const float* up = static_cast<const float*>(dy.data_ptr());
  Rows heads(weight, d), to(dhidden, d);
  const Kernels& k = kernels();
  parallel(t, grain_of(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t label = label_of(labels, i);
      if (label < 0)
        std::memset(to[i], 0, to.stride);
      else
        k.scaled(heads.type, up[i], heads[label], to[i], d);
    }
  });
  return dhidden;
}

// Tokens of one label are added in their order by one thread.
std::tuple<Tensor, Tensor> label_logits_bwd_weight(Tensor dy, Tensor hidden, Tensor labels, int64_t v) {
  dy = contiguous(dy), hidden = contiguous(hidden), labels = contiguous(labels);
  check_labels(labels, v);
  int64_t t = hidden.size(0), d = hidden.size(1);
  Tensor dweight = torch::stable::new_zeros(hidden, {v, d}), dbias = torch::stable::new_zeros(hidden, {v});
  std::vector<std::pair<int64_t, int64_t>> order;  // label, token
  for (int64_t i = 0; i < t; i++)
    if (label_of(labels, i) >= 0) order.emplace_back(label_of(labels, i), i);
  std::sort(order.begin(), order.end());
  std::vector<size_t> first;
  for (size_t i = 0; i < order.size(); i++)
    if (i == 0 || order[i].first != order[i - 1].first) first.push_back(i);
  first.push_back(order.size());
  const float* up = static_cast<const float*>(dy.data_ptr());
  Rows rows(hidden, d), to(dweight, d), to_bias(dbias, 1);
  const Kernels& k = kernels();
  parallel(static_cast<int64_t>(first.size()) - 1, grain_of(d), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(d);
    for (int64_t i = begin; i < end; i++) {
      int64_t label = order[first[i]].first;
      float bias = 0.0f;
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (size_t at = first[i]; at < first[i + 1]; at++) {
        int64_t token = order[at].second;
        k.add_scaled(rows.type, up[token], rows[token], sum.data(), d);
        bias += up[token];
      }
      k.narrow(to.type, sum.data(), to[label], d);
      k.narrow(to.type, &bias, to_bias[label], 1);
    }
  });
  return {dweight, dbias};
}

void use_instructions(std::string name) { use(name.c_str()); }
std::string instructions() { return kernels().name; }

}  // namespace
}  // namespace fastalign

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign, m) {
  m.def("hadamard_reweight_fwd.native(Tensor h, Tensor w) -> Tensor");
  m.def("hadamard_reweight_bwd.native(Tensor dy, Tensor h, Tensor w, bool needs_w) -> (Tensor, Tensor)");
  m.def("calibrate_fwd.native(Tensor x, Tensor vision_mask, Tensor scale, Tensor shift) -> Tensor");
  m.def("calibrate_bwd.native(Tensor dy, Tensor x, Tensor vision_mask, Tensor scale) -> (Tensor, Tensor, Tensor)");
  m.def("label_logits_fwd.native(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias) -> Tensor");
  m.def("label_logits_bwd_hidden.native(Tensor dy, Tensor weight, Tensor labels) -> Tensor");
  m.def("label_logits_bwd_weight.native(Tensor dy, Tensor hidden, Tensor labels, SymInt v) -> (Tensor, Tensor)");
  m.def("native_use(str name) -> ()");
  m.def("native_instructions() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CPU, m) {
  m.impl("hadamard_reweight_fwd.native", TORCH_BOX(&fastalign::hadamard_fwd));
  m.impl("hadamard_reweight_bwd.native", TORCH_BOX(&fastalign::hadamard_bwd));
  m.impl("calibrate_fwd.native", TORCH_BOX(&fastalign::calibrate_fwd));
  m.impl("calibrate_bwd.native", TORCH_BOX(&fastalign::calibrate_bwd));
  m.impl("label_logits_fwd.native", TORCH_BOX(&fastalign::label_logits_fwd));
  m.impl("label_logits_bwd_hidden.native", TORCH_BOX(&fastalign::label_logits_bwd_hidden));
  m.impl("label_logits_bwd_weight.native", TORCH_BOX(&fastalign::label_logits_bwd_weight));
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CompositeExplicitAutograd, m) {
  m.impl("native_use", TORCH_BOX(&fastalign::use_instructions));
  m.impl("native_instructions", TORCH_BOX(&fastalign::instructions));
}
