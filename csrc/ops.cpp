// The CPU operators of beit3_fast on LibTorch's stable ABI: checks arguments, borrows torch's
// threads, and hands raw pointers to cpu/. Nothing here depends on the torch or the Python version.
//
// Kernels run on the calling thread and torch's own pool; nothing holds or needs the GIL.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/expert_linear.h"
#include "cpu/isa.h"
#include "cpu/packed_weight.h"
#include "cpu/patch_embedding.h"
#include "linear_operands.h"
#include "passing_rows.h"

namespace {

using beit3_fast::cpu::Activation;
using beit3_fast::cpu::DType;
using beit3_fast::cpu::Expert;
using beit3_fast::cpu::ExpertLinear;
using beit3_fast::cpu::Parameter;
using beit3_fast::cpu::PatchEmbedding;
using namespace beit3_fast::operands;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// So many numbers that are kept for long, on the CPU (huge_pages.h).
Tensor lasting_empty(int64_t count, int64_t bytes, ScalarType dtype) {
  const int64_t shape[] = {count}, strides[] = {1};
  return torch::stable::from_blob(beit3_fast::cpu::take_lasting(bytes), {shape, 1}, {strides, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  beit3_fast::cpu::give_lasting);
}

// A matrix as packed weight [out, in], or as the one that it is the transpose of.
Tensor packed_from(const Tensor& x, bool transposed, const char* op, const char* name) {
  const DType dtype = dtype_of(x, op, name);
  require_matrix(x, op, name);
  const int64_t out = x.size(transposed ? 1 : 0), in = x.size(transposed ? 0 : 1);
  require(out > 0 && in > 0, op, ": ", name, " must not be empty, got shape ", shape_of(x));
  const int64_t bytes = beit3_fast::cpu::packed_bytes(dtype, out, in);
  const int64_t count = bytes / static_cast<int64_t>(x.element_size());
  Tensor packed = transposed ? passing_like(x, {count}, kBetweenFrom)
                             : lasting_empty(count, bytes, x.scalar_type());
  const auto pack = transposed ? beit3_fast::cpu::pack_transposed : beit3_fast::cpu::pack_weight;
  pack(torch_pool(), dtype, x.const_data_ptr(), x.stride(0), out, in, packed.mutable_data_ptr());
  return packed;
}

Tensor pack_weight(Tensor weight) { return packed_from(weight, false, "pack_weight", "weight"); }

Tensor pack_transposed(Tensor x) { return packed_from(x, true, "pack_transposed", "x"); }

Tensor quantize_weight(Tensor weight) {
  const DType dtype = dtype_of(weight, "quantize_weight", "weight");
  require_matrix(weight, "quantize_weight", "weight");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  require(rows > 0 && columns > 0, "quantize_weight: weight must not be empty, got shape ",
          shape_of(weight));
  require(columns <= 1 << 17, "quantize_weight: int32 holds sums of at most ", 1 << 17,
          " products, got ", columns, " in-features");
  const int64_t bytes = beit3_fast::cpu::packed_bytes(DType::kInt8, rows, columns);
  Tensor packed = lasting_empty(bytes, bytes, ScalarType::Char);
  beit3_fast::cpu::quantize_weight(torch_pool(), dtype, weight.const_data_ptr(), weight.stride(0),
                                   rows, columns, packed.mutable_data_ptr());
  return packed;
}

Tensor unpack_weight(Tensor packed, int64_t rows, int64_t columns) {
  const DType dtype = form_of(packed, "unpack_weight");
  require(rows > 0 && columns > 0 && holds_weight(packed, dtype, rows, columns),
          "unpack_weight: not a weight of shape [", rows, ", ", columns,
          "] and this dtype packed by pack_weight of this build");
  const int64_t shape[] = {rows, columns};
  Tensor weight = torch::stable::new_empty(
      packed, {shape, 2}, dtype == DType::kInt8 ? ScalarType::Float : packed.scalar_type());
  beit3_fast::cpu::unpack_weight(torch_pool(), dtype, packed.const_data_ptr(), rows, columns,
                                 weight.mutable_data_ptr());
  return weight;
}

Parameter entry_of(const std::vector<Tensor>& list, std::size_t expert, int64_t size,
                   const char* name) {
  if (list.empty()) return {};
  return parameter_of(list[expert], size, "expert_linear", Entry{name, expert});
}

void require_list(const std::vector<Tensor>& list, std::size_t experts, const char* name) {
  require(list.empty() || list.size() == experts, "expert_linear: ", name, " must have 0 or ",
          experts, " entries, got ", list.size());
}

// Checks that the named rows are distinct rows of the output, and clears those that are not named.
const int64_t* take_rows(const Tensor& rows, int64_t sorted, Tensor& out) {
  constexpr const char* op = "expert_linear";
  require(rows.is_cpu() && rows.scalar_type() == ScalarType::Long && rows.dim() == 1 &&
              rows.is_contiguous(),
          op, ": rows must be a contiguous int64 CPU tensor with 1 dimension");
  require(rows.size(0) == sorted, op, ": rows has ", rows.size(0), " entries but bounds end at ",
          sorted);
  const auto* index = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t count = out.size(0);
  std::vector<bool> named(static_cast<std::size_t>(count), false);
  for (int64_t i = 0; i < sorted; ++i) {
    require(index[i] >= 0 && index[i] < count, op, ": rows[", i, "] is ", index[i],
            ", outside the ", count, " rows of x");
    require(!named[static_cast<std::size_t>(index[i])], op, ": rows names row ", index[i],
            " twice");
    named[static_cast<std::size_t>(index[i])] = true;
  }
  if (sorted < count) {
    const std::size_t bytes =
        static_cast<std::size_t>(out.size(1)) * static_cast<std::size_t>(out.element_size());
    auto* base = static_cast<char*>(out.mutable_data_ptr());
    for (std::size_t i = 0; i < named.size(); ++i) {
      if (!named[i]) std::memset(base + i * bytes, 0, bytes);
    }
  }
  return index;
}

Tensor expert_linear(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> packed,
                     std::vector<Tensor> biases, std::vector<Tensor> norm_weights,
                     std::vector<Tensor> norm_biases, std::optional<Tensor> residual,
                     std::optional<Tensor> rows, std::vector<int64_t> bounds, double eps,
                     StringHandle activation_handle) {
  constexpr const char* op = "expert_linear";
  const std::string activation = take(activation_handle);
  ExpertLinear call;
  call.dtype = dtype_of(x, op, "x");
  require_matrix(x, op, "x");
  const std::size_t experts = weights.size();
  require(experts > 0, op, ": needs at least one weight");
  require(packed.size() % experts == 0, op,
          ": packed must have the same number of parts for each of ", experts, " weights, got ",
          packed.size(), " in all");
  const DType form = packed.empty() ? call.dtype : form_of(packed[0], op);
  call.int8 = form == DType::kInt8;
  require_list(biases, experts, "biases");
  require_list(norm_weights, experts, "norm_weights");
  require_list(norm_biases, experts, "norm_biases");
  require(norm_weights.size() == norm_biases.size(), op, ": norm_weights has ", norm_weights.size(),
          " entries but norm_biases ", norm_biases.size());
  require(activation == "none" || activation == "gelu", op,
          ": activation must be 'none' or 'gelu', got '", activation, "'");
  call.eps = eps_of(eps, op);
  require(weights[0].dim() == 2, op, ": weights must be [O, I], got shape ", shape_of(weights[0]));
  const int64_t rows_in = x.size(0);
  const int64_t in_features = x.size(1), out_features = weights[0].size(0);
  require(in_features > 0 && out_features > 0, op, ": needs at least one in- and out-feature");

  require_bounds(bounds, experts, op);
  const int64_t sorted = bounds[experts];
  require(rows.has_value() || sorted == rows_in, op, ": bounds end at ", sorted, " but x has ",
          rows_in, " rows");

  call.experts.reserve(experts);
  for (std::size_t e = 0; e < experts; ++e) {
    const Tensor& weight = weights[e];
    require_same_type(weight, x, op, "every weight");
    require(weight.dim() == 2 && weight.size(0) == out_features && weight.size(1) == in_features,
            op, ": weights[", e, "] must have shape [", out_features, ", ", in_features, "], got ",
            shape_of(weight));
    // Only its shape counts once the packed form is there: the caller may pass a stand-in without
    // memory.
    Expert expert;
    expert.weight = weight.const_data_ptr();
    expert.weight_stride = weight.stride(0);
    if (packed.empty()) {
      require_matrix(weight, op, "every weight");
    } else {  // the weight is never read: any strides will do
      const std::size_t parts = packed.size() / experts;
      take_packed(op, packed, e * parts, parts, form, call.dtype, out_features, in_features,
                  expert);
    }
    if (!biases.empty()) expert.bias = {entry_of(biases, e, out_features, "biases")};
    expert.norm_weight = entry_of(norm_weights, e, in_features, "norm_weights");
    expert.norm_bias = entry_of(norm_biases, e, in_features, "norm_biases");
    expert.begin = bounds[e];
    expert.end = bounds[e + 1];
    call.experts.push_back(std::move(expert));
  }
  if (residual.has_value()) {
    require_same_type(*residual, x, op, "residual");
    require_matrix(*residual, op, "residual");
    require(residual->size(0) == rows_in && residual->size(1) == out_features, op,
            ": residual must have shape [", rows_in, ", ", out_features, "], got ",
            shape_of(*residual));
    call.residual = residual->const_data_ptr();
    call.residual_stride = residual->stride(0);
  }

  Tensor out = rows_like(x, rows_in, out_features);
  if (rows.has_value()) call.rows = take_rows(*rows, sorted, out);
  if (sorted == 0) return out;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.out = out.mutable_data_ptr();
  call.out_stride = out_features;
  call.in_features = in_features;
  call.out_features = out_features;
  call.activation = activation == "gelu" ? Activation::kGelu : Activation::kNone;
  beit3_fast::cpu::expert_linear(torch_pool(), call);
  return out;
}

int64_t product_loop(Tensor x, Tensor packed, int64_t repeats) {
  constexpr const char* op = "product_loop";
  ExpertLinear call;
  call.dtype = dtype_of(x, op, "x");
  require_matrix(x, op, "x");
  const DType form = form_of(packed, op);
  call.int8 = form == DType::kInt8;
  require(form == DType::kInt8 || form == call.dtype, op,
          ": packed must be of the dtype of x or int8");
  require(repeats > 0 && x.size(0) > 0 && x.size(1) > 0, op, ": needs rows, columns and repeats");
  call.in_features = x.size(1);
  call.out_features = 2 * beit3_fast::cpu::kPanel;
  require(holds_weight(packed, form, call.out_features, call.in_features), op,
          ": packed must be a weight [", call.out_features, ", ", call.in_features,
          "] packed by pack_weight of this build");
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  Expert expert;
  expert.packed.push_back(packed.const_data_ptr());
  expert.end = x.size(0);
  call.experts.push_back(expert);
  return beit3_fast::cpu::product_loop(torch_pool(), call, repeats);
}

std::tuple<Tensor, Tensor> patch_embedding(Tensor images, Tensor packed, std::optional<Tensor> bias,
                                           Tensor cls_token, Tensor mask_token,
                                           std::optional<Tensor> positions,
                                           std::optional<Tensor> masked, int64_t patch,
                                           bool with_words) {
  constexpr const char* op = "patch_embedding";
  PatchEmbedding call;
  call.dtype = dtype_of(images, op, "images");
  require(images.dim() == 4 && images.is_contiguous(), op,
          ": images must be contiguous [B, K, H, W], got shape ", shape_of(images));
  call.batch = images.size(0);
  call.channels = images.size(1);
  call.height = images.size(2);
  call.width = images.size(3);
  require(patch > 0 && call.channels > 0 && call.height > 0 && call.width > 0 &&
              call.height % patch == 0 && call.width % patch == 0,
          op, ": images must be positive multiples of the patch ", patch, ", got shape ",
          shape_of(images));
  call.patch = patch;
  const int64_t patches = call.height / patch * (call.width / patch);
  require(cls_token.dim() == 1 && cls_token.size(0) > 0, op, ": cls_token must be [C], got shape ",
          shape_of(cls_token));
  const int64_t out_features = cls_token.size(0);
  const int64_t in_features = call.channels * patch * patch;
  require(dtype_of(packed, op, "packed") == call.dtype &&
              holds_weight(packed, call.dtype, out_features, in_features),
          op, ": packed is not a weight of shape [", out_features, ", ", in_features,
          "] and this dtype packed by pack_weight of this build");
  call.packed = packed.const_data_ptr();
  call.out_features = out_features;
  call.cls_token = parameter_of(cls_token, out_features, op, "cls_token");
  call.mask_token = parameter_of(mask_token, out_features, op, "mask_token");
  if (bias.has_value()) call.bias = parameter_of(*bias, out_features, op, "bias");
  if (positions.has_value()) {
    require_same_type(*positions, images, op, "positions");
    require(positions->dim() == 2 && positions->is_contiguous() &&
                positions->size(0) == patches + 1 && positions->size(1) == out_features,
            op, ": positions must be contiguous [", patches + 1, ", ", out_features,
            "], got shape ", shape_of(*positions));
    call.positions = positions->const_data_ptr();
  }
  if (masked.has_value()) {
    require(masked->is_cpu() && masked->scalar_type() == ScalarType::Bool && masked->dim() == 2 &&
                masked->is_contiguous() && masked->size(0) == call.batch &&
                masked->size(1) == patches,
            op, ": masked must be a contiguous bool CPU tensor [", call.batch, ", ", patches,
            "], got shape ", shape_of(*masked));
    call.masked = static_cast<const unsigned char*>(masked->const_data_ptr());
  }

  const int64_t rows = call.batch * (patches + 1);
  Tensor out = rows_like(images, rows, out_features);
  Tensor words = rows_like(images, with_words ? rows : 0, out_features);
  if (call.batch == 0) return {out, words};
  call.images = images.const_data_ptr();
  call.out = out.mutable_data_ptr();
  if (with_words) call.words = words.mutable_data_ptr();
  beit3_fast::cpu::patch_embedding(torch_pool(), call);
  return {out, words};
}

std::string cpu_isa() { return beit3_fast::cpu::isa_name(beit3_fast::cpu::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY(beit3_fast, m) {
  m.def("cpu_isa() -> str");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("pack_transposed(Tensor x) -> Tensor");
  m.def("quantize_weight(Tensor weight) -> Tensor");
  m.def("unpack_weight(Tensor packed, int out_features, int in_features) -> Tensor");
  m.def("product_loop(Tensor x, Tensor packed, int repeats) -> int");
  m.def(
      "expert_linear(Tensor x, Tensor[] weights, Tensor[] packed, Tensor[] biases, "
      "Tensor[] norm_weights, Tensor[] norm_biases, Tensor? residual, Tensor? rows, int[] bounds, "
      "float eps, str activation) -> Tensor");
  m.def(
      "patch_embedding(Tensor images, Tensor packed, Tensor? bias, Tensor cls_token, "
      "Tensor mask_token, Tensor? positions, Tensor? masked, int patch, bool with_words=False) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("pack_transposed", TORCH_BOX(&pack_transposed));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
  m.impl("product_loop", TORCH_BOX(&product_loop));
  m.impl("expert_linear", TORCH_BOX(&expert_linear));
  m.impl("patch_embedding", TORCH_BOX(&patch_embedding));
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
