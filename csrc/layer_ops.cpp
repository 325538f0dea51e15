// Whole layers on LibTorch's stable ABI, see ops.cpp: the products and the attention of all layers
// of an encoder in a single call, or those of one layer in a step of decoding.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention_operands.h"
#include "cpu/sample_blocks.h"
#include "linear_operands.h"
#include "norm_operands.h"
#include "passing_rows.h"

namespace {

using beit3_fast::cpu::Activation;
using beit3_fast::cpu::CachedAttention;
using beit3_fast::cpu::elements_on;
using beit3_fast::cpu::Expert;
using beit3_fast::cpu::ExpertLinear;
using beit3_fast::cpu::kStrip;
using beit3_fast::cpu::LayerProducts;
using beit3_fast::cpu::LayersBySample;
using beit3_fast::cpu::level_of;
using beit3_fast::cpu::NormExpert;
using beit3_fast::cpu::RowStatistics;
using beit3_fast::cpu::SharedAttention;
using namespace beit3_fast::operands;
using Bounds = std::vector<int64_t>;

// Lists of the parameters of layers, one layer after the other. Of each product after product
// (queries, keys and values; their projection; the two of the feed-forward network), in each expert
// after expert.
struct Parameters {
  std::vector<Tensor> packed;  // an expert's queries, keys and values lie apart
  std::vector<Tensor> biases;  // as packed
  std::vector<Tensor> norm_weights;
  std::vector<Tensor> norm_biases;
  std::vector<double> eps;
};

// Rows of the experts: those of attention among all rows and among those that ask, and those of the
// feed-forward network.
struct Ranges {
  Bounds all;
  Bounds own;
  Bounds ffn;
};

enum ProductName : std::size_t { kProject, kOut, kFirst, kSecond };
constexpr std::size_t kProducts = 4;
constexpr std::size_t kParts = 3;  // of kProject

std::size_t ranges(const Bounds& bounds) { return bounds.empty() ? 0 : bounds.size() - 1; }

// How many layers the lists are of.
std::size_t layers_of(const char* op, const Parameters& own, const Ranges& bounds) {
  const std::size_t experts = ranges(bounds.all), ffn_experts = ranges(bounds.ffn);
  require(experts > 0 && ffn_experts > 0, op, ": needs bounds of at least one expert");
  const std::size_t layers = own.eps.size() / kProducts;
  const std::size_t norms = 2 * (experts + ffn_experts) * layers;
  const std::size_t products = norms + (kParts - 1) * experts * layers;
  require(layers > 0 && own.eps.size() == layers * kProducts && own.packed.size() == products &&
              own.biases.size() == products && own.norm_weights.size() == norms &&
              own.norm_biases.size() == norms,
          op, ": expected ", 2 * (experts + ffn_experts) + (kParts - 1) * experts,
          " weights and biases, ", 2 * (experts + ffn_experts),
          " norms and 4 eps for each layer, got ", own.packed.size(), ", ", own.biases.size(), ", ",
          own.norm_weights.size(), ", ", own.norm_biases.size(), " and ", own.eps.size());
  for (const double eps : own.eps) eps_of(eps, op);  // before anything runs
  return layers;
}

// Room for the statistics of rows that go from kernel to kernel.
struct Statistics {
  explicit Statistics(int64_t rows) {
    constexpr std::size_t kKinds = 4;
    thread_local beit3_fast::cpu::Scratch memory;
    auto* at = static_cast<RowStatistics*>(
        memory.at_least(static_cast<int64_t>(kKinds * sizeof(RowStatistics)) * rows));
    for (RowStatistics** kind : {&passing, &attention, &attended, &hidden}) {
      *kind = at;
      at += rows;
    }
    std::fill_n(passing, rows, beit3_fast::cpu::kUnmeasured);
  }

  RowStatistics* passing;    // of what goes from layer to layer
  RowStatistics* attention;  // of its result
  RowStatistics* attended;   // of that, projected and added
  RowStatistics* hidden;
};

// The products of one layer, prepared but for the rows that they read and write. All layers of a
// call are prepared before the first is computed: between kernels, which leave nothing in the
// caches, the same work takes ten times as long.
class Layer {
 public:
  // Layer `index` of the lists, for `rows` rows like x [.., C] of which `asked` ask. Where `apart`,
  // queries are projected from other rows than keys and values.
  Layer(const char* op, const Tensor& x, const Parameters& own, std::size_t index,
        const Ranges& bounds, int64_t rows, int64_t asked, bool apart)
      : op_(op), like_(x), own_(own), dtype_(dtype_of(x, op, "x")), width_(x.size(1)) {
    const std::size_t experts = ranges(bounds.all), ffn_experts = ranges(bounds.ffn);
    const std::size_t norms = 2 * (experts + ffn_experts);
    const std::size_t weight = index * (norms + (kParts - 1) * experts), norm = index * norms;
    form_ = form_of(own.packed[weight], op);
    experts_ = {experts, experts, ffn_experts, ffn_experts};
    first_ = {weight, weight + kParts * experts, weight + (kParts + 1) * experts,
              weight + (kParts + 1) * experts + ffn_experts};
    norm_ = {norm, norm + experts, norm + 2 * experts, norm + 2 * experts + ffn_experts};
    eps_ = index * kProducts;
    const Tensor& bias = own.biases[first_[kFirst]];
    require(bias.dim() == 1 && bias.size(0) > 0, op, ": a bias must be [F], got ", shape_of(bias));
    const int64_t hidden = bias.size(0);
    products_.project = product(kProject, width_, width_, bounds.all, rows, apart ? 1 : 0, kParts);
    if (apart) queries_ = product(kProject, width_, width_, bounds.own, asked, 0, 1);
    products_.rest.project = product(kOut, width_, width_, bounds.own, asked);
    products_.rest.first = product(kFirst, width_, hidden, bounds.ffn, asked);
    products_.rest.first.activation = Activation::kGelu;
    products_.rest.second = product(kSecond, hidden, width_, bounds.ffn, asked);
  }

  int64_t width() const { return width_; }

  // Without queries that are apart.
  const LayerProducts& products() const { return products_; }

  // LayerNorm and queries, keys and values of x side by side, or keys and values where queries are
  // apart. In strips where `in_strips`: [columns / kStrip][rows][kStrip] in the memory of the
  // result.
  Tensor project(const Tensor& x, const RowStatistics* statistics, bool in_strips = false) {
    products_.project.x_statistics = statistics;
    return project_by(products_.project, x, in_strips);
  }

  // Queries that are apart.
  Tensor project_queries(const Tensor& x, bool in_strips) {
    return project_by(queries_, x, in_strips);
  }

  // Whether nothing but kernels that read strips meets queries, keys, values and the result of
  // attention, and a head is a strip of them.
  bool takes_strips(int64_t head_dim) const {
    return head_dim == kStrip && level_of(products_.project).linear.high_blocks;
  }

  // Whether attention measures rows as these products would: those of int8 have their own level of
  // instructions, and with it another order of additions.
  bool measures_attention() const { return form_ != DType::kInt8; }

  // What follows attention o (in strips or not): its projection, added to the rows x, and the
  // feed-forward network. Takes o, whose memory is given back when it is read.
  // `stays`: whether the result outlives the call.
  Tensor rest(Tensor o, bool in_strips, const Tensor& x, bool stays, const Statistics& statistics) {
    const int64_t rows = o.size(0);
    Tensor y = stays ? rows_like(x, rows, width_) : rows_between(x, rows, width_);
    auto& [out, first, second] = products_.rest;
    read_from(o, out);
    if (in_strips) {
      out.x_stride = kStrip;
      out.x_strip = kStrip * rows;
    }
    add(x, out);
    if (measures_attention()) out.x_statistics = statistics.attention;
    second.statistics = statistics.passing;
    const Pool pool = torch_pool();
    if (beit3_fast::cpu::wants_layer_rest(pool, level_of(out).linear, rows)) {
      write_to(y, second);
      beit3_fast::cpu::layer_rest(pool, products_.rest);
      return y;
    }
    const Tensor attended = rows_between(x, rows, width_);
    write_to(attended, out);
    out.statistics = statistics.attended;
    first.x_statistics = statistics.attended;
    first.statistics = statistics.hidden;
    second.x_statistics = statistics.hidden;
    {
      const Tensor read = std::move(o);
      beit3_fast::cpu::expert_linear(pool, out);
    }
    const Tensor hidden = rows_between(x, rows, first.out_features);
    read_from(attended, first);
    write_to(hidden, first);
    beit3_fast::cpu::expert_linear(pool, first);
    read_from(hidden, second);
    add(attended, second);
    write_to(y, second);
    beit3_fast::cpu::expert_linear(pool, second);
    return y;
  }

 private:
  Tensor project_by(ExpertLinear& call, const Tensor& x, bool in_strips) const {
    // Gone when the feed-forward network begins, whose rows are mostly wider.
    const Tensor y =
        rows_between(x, x.size(0), call.out_features, products_.rest.first.out_features);
    read_from(x, call);
    write_to(y, call);
    if (in_strips) {
      call.out_stride = kStrip;
      call.out_strip = kStrip * x.size(0);
    }
    beit3_fast::cpu::expert_linear(torch_pool(), call);
    return y;
  }

  static void read_from(const Tensor& x, ExpertLinear& call) {
    call.x = x.const_data_ptr();
    call.x_stride = x.stride(0);
  }

  static void write_to(const Tensor& y, ExpertLinear& call) {
    call.out = y.mutable_data_ptr();
    call.out_stride = y.size(1);
  }

  static void add(const Tensor& residual, ExpertLinear& call) {
    call.residual = residual.const_data_ptr();
    call.residual_stride = residual.stride(0);
  }

  // The parts [from, to) of a product, side by side, each of `height` columns.
  ExpertLinear product(ProductName name, int64_t in_features, int64_t height, const Bounds& bounds,
                       int64_t rows, std::size_t from = 0, std::size_t to = 1) const {
    const std::size_t experts = experts_[name];
    require_bounds(bounds, experts, op_);
    require(bounds[experts] == rows, op_, ": bounds end at ", bounds[experts], " but there are ",
            rows, " rows");
    ExpertLinear call;
    call.dtype = dtype_;
    call.int8 = form_ == DType::kInt8;
    call.in_features = in_features;
    call.out_features = height * static_cast<int64_t>(to - from);
    call.eps = static_cast<float>(own_.eps[eps_ + name]);
    call.experts.resize(experts);
    const std::size_t parts = name == kProject ? kParts : 1;
    for (std::size_t e = 0; e < experts; ++e) {
      Expert& expert = call.experts[e];
      const std::size_t first = first_[name] + e * parts + from;
      take_packed(op_, own_.packed, first, to - from, form_, dtype_, call.out_features, in_features,
                  expert);
      for (std::size_t i = 0; i < to - from; ++i) {
        const Tensor& bias = own_.biases[first + i];
        require_same_type(bias, like_, op_, "every bias");
        expert.bias.push_back(parameter_of(bias, height, op_, Entry{"biases", first + i}));
      }
      const std::size_t norm = norm_[name] + e;
      expert.norm_weight =
          parameter_of(own_.norm_weights[norm], in_features, op_, Entry{"norm_weights", norm});
      expert.norm_bias =
          parameter_of(own_.norm_biases[norm], in_features, op_, Entry{"norm_biases", norm});
      expert.begin = bounds[e];
      expert.end = bounds[e + 1];
    }
    return call;
  }

  const char* op_;
  const Tensor& like_;
  const Parameters& own_;
  DType dtype_;
  DType form_;
  int64_t width_;
  // Of each product: its experts, and where its weights and its norms begin in the lists.
  std::array<std::size_t, kProducts> experts_;
  std::array<std::size_t, kProducts> first_;
  std::array<std::size_t, kProducts> norm_;
  std::size_t eps_;
  LayerProducts products_;
  ExpertLinear queries_;
};

bool of_one_expert(const Bounds& bounds) {
  std::size_t found = 0;
  for (std::size_t e = 0; e < ranges(bounds); ++e) found += bounds[e + 1] > bounds[e] ? 1 : 0;
  return found == 1;
}

// All layers by samples, where that is the faster way. `stays`: whether the result outlives the
// call.
std::optional<Tensor> by_sample(const Tensor& x, const std::vector<Layer>& layers,
                                const SharedAttention& layout, bool stays) {
  const Pool pool = torch_pool();
  const LayerProducts& like = layers[0].products();
  const int64_t rows = x.size(0), width = x.size(1);
  const auto blocks = beit3_fast::cpu::sample_blocks(pool, level_of(like.project).linear, layout,
                                                     width, like.rest.first.out_features);
  if (blocks.empty()) return std::nullopt;
  const Tensor between = rows_between(x, rows, width);
  Tensor y = stays ? rows_like(x, rows, width) : rows_between(x, rows, width);
  LayersBySample call;
  for (const Layer& layer : layers) call.layers.push_back(&layer.products());
  call.layout = layout;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.between = between.mutable_data_ptr();
  call.out = y.mutable_data_ptr();
  call.out_stride = width;
  beit3_fast::cpu::layers_by_sample(pool, blocks, call);
  return y;
}

// As the ops scale by default.
double scale_of(int64_t head_dim) { return std::pow(static_cast<double>(head_dim), -0.5); }

void require_rows(const Tensor& x, const char* op) {
  require_matrix(x, op, "x");
  require(x.size(0) > 0 && x.size(1) > 0, op, ": x must not be empty, got shape ", shape_of(x));
}

// Rows of x, one after the other: row(i) for every i in [0, count).
template <class Row>
Tensor gathered(const Tensor& x, int64_t count, const Row& row) {
  Tensor y = rows_like(x, count, x.size(1));
  const auto size = static_cast<int64_t>(x.element_size());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const auto bytes = static_cast<std::size_t>(x.size(1) * size);
  for (int64_t i = 0; i < count; ++i, to += bytes) {
    std::memcpy(to, from + row(i) * x.stride(0) * size, bytes);
  }
  return y;
}

// The named rows of x.
Tensor select(const Tensor& x, const Tensor& rows, const char* op) {
  require(rows.is_cpu() && rows.scalar_type() == ScalarType::Long && rows.dim() == 1 &&
              rows.is_contiguous(),
          op, ": rows must be a contiguous int64 CPU tensor with 1 dimension");
  const auto* index = static_cast<const int64_t*>(rows.const_data_ptr());
  for (int64_t i = 0; i < rows.size(0); ++i) {
    require(index[i] >= 0 && index[i] < x.size(0), op, ": rows[", i, "] is ", index[i],
            ", outside the ", x.size(0), " rows of x");
  }
  return gathered(x, rows.size(0), [&](int64_t i) { return index[i]; });
}

// The last `count` rows of each of so many sequences, which x has one after the other.
Tensor last_rows(const Tensor& x, int64_t sequences, int64_t count) {
  const int64_t each = x.size(0) / sequences;
  return gathered(x, sequences * count,
                  [&](int64_t i) { return i / count * each + each - count + i % count; });
}

// The attention of the queries, which are all rows of x or `selected` ones, without its projection.
Tensor attend(Layer& layer, const Tensor& x, const Tensor& queries, bool selected, bool in_strips,
              const Statistics& statistics, SharedAttention& call) {
  const int64_t width = layer.width();
  // Queries in front of keys and values where all are of the same rows.
  const Tensor projected = layer.project(x, selected ? nullptr : statistics.passing, in_strips);
  const Tensor q = selected ? layer.project_queries(queries, in_strips) : projected;
  Tensor o = rows_between(x, queries.size(0), width);
  const int64_t part = in_strips ? width * x.size(0) : width;
  const int64_t keys_at = selected ? 0 : part;
  call.q = q.const_data_ptr();
  call.k = elements_on(projected.const_data_ptr(), keys_at, call.dtype);
  call.v = elements_on(projected.const_data_ptr(), keys_at + part, call.dtype);
  call.out = o.mutable_data_ptr();
  call.q_stride = q.stride(0);
  call.k_stride = call.v_stride = projected.stride(0);
  call.out_stride = width;
  call.head_dim = call.q_head = call.key_head = call.out_head = width / call.num_heads;
  if (in_strips) {
    call.q_stride = call.k_stride = call.v_stride = call.out_stride = kStrip;
    call.q_head = kStrip * q.size(0);
    call.key_head = kStrip * x.size(0);
    call.out_head = kStrip * o.size(0);
  }
  call.statistics = layer.measures_attention() ? statistics.attention : nullptr;
  beit3_fast::cpu::shared_attention(torch_pool(), call);
  return o;
}

Tensor encoder_layers(Tensor x, std::vector<Tensor> packed, std::vector<Tensor> biases,
                      std::vector<Tensor> norm_weights, std::vector<Tensor> norm_biases,
                      std::vector<double> eps, Bounds bounds, Bounds own_bounds, Bounds ffn_bounds,
                      int64_t num_heads, std::vector<Tensor> last_weights,
                      std::vector<Tensor> last_biases, std::vector<double> last_eps,
                      Bounds last_bounds, StringHandle mask_handle, Tensor cu_vision,
                      Tensor cu_text, std::optional<Tensor> rows, std::optional<Tensor> cu_vision_q,
                      std::optional<Tensor> cu_text_q, std::optional<Tensor> positions_q,
                      std::optional<int64_t> most_rows) {
  constexpr const char* op = "encoder_layers";
  const std::string mask = take(mask_handle);
  require_rows(x, op);
  const Parameters own{std::move(packed), std::move(biases), std::move(norm_weights),
                       std::move(norm_biases), std::move(eps)};
  const Ranges of_experts{std::move(bounds), std::move(own_bounds), std::move(ffn_bounds)};
  const std::size_t count = layers_of(op, own, of_experts);
  const int64_t width = x.size(1);
  require_heads(num_heads, width, op);
  const bool selected = rows.has_value();
  require(selected == cu_vision_q.has_value(), op, ": rows and cu_vision_q come together");
  require(!selected || count == 1, op, ": rows are those that one layer computes, got ", count,
          " layers");
  const Tensor queries = selected ? select(x, *rows, op) : x;
  std::vector<Layer> layers;
  layers.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    layers.emplace_back(op, x, own, i, of_experts, x.size(0), queries.size(0), selected);
  }
  SharedAttention call;
  call.dtype = dtype_of(x, op, "x");
  call.mask = mask_of(mask, op);
  call.num_heads = num_heads;
  take_layout({cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q}, x.size(0), queries.size(0),
              false, op, call);
  std::vector<NormExpert> last;
  if (!last_weights.empty() || !last_biases.empty() || !last_eps.empty() || !last_bounds.empty()) {
    last = norm_experts(x, queries.size(0),
                        {last_weights, last_biases, last_eps, last_bounds, "last_weights",
                         "last_biases", "last_bounds"},
                        op);
  }
  if (queries.size(0) == 0) return queries;
  call.scale = static_cast<float>(scale_of(width / num_heads));
  if (!selected && of_one_expert(of_experts.all) && of_one_expert(of_experts.ffn)) {
    if (std::optional<Tensor> y = by_sample(x, layers, call, last.empty())) {
      return last.empty() ? *y : layer_norm(*y, std::move(last), op);
    }
  }
  // What lies between kernels grows with the rows, but for rows that are taken by samples.
  require(!most_rows.has_value() || x.size(0) <= *most_rows, op, ": at most ",
          most_rows.value_or(0), " rows at once, got ", x.size(0));

  Tensor y = queries;
  const Statistics statistics(queries.size(0));
  for (Layer& layer : layers) {
    const Tensor& from = selected ? x : y;
    const bool strips = layer.takes_strips(width / num_heads);
    const bool stays = last.empty() && &layer == &layers.back();
    y = layer.rest(attend(layer, from, y, selected, strips, statistics, call), strips, y, stays,
                   statistics);
  }
  return last.empty() ? y : layer_norm(y, std::move(last), op);
}

// Rows [.., C] of projected queries, keys and values: those of sequence s, `count` of them, become
// the rows from `place` on of sample samples[s] of a cache [B, N, C].
void write_rows(const Tensor& projected, int64_t column, int64_t count, const int64_t* samples,
                int64_t sequences, int64_t place, Tensor& cache) {
  const auto size = static_cast<int64_t>(cache.element_size());
  const auto bytes = static_cast<std::size_t>(cache.size(2) * size);
  const auto* from = static_cast<const char*>(projected.const_data_ptr()) + column * size;
  auto* to = static_cast<char*>(cache.mutable_data_ptr());
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = samples[s] * cache.stride(0) + (place + i) * cache.stride(1);
      std::memcpy(to + at * size, from + (s * count + i) * projected.stride(0) * size, bytes);
    }
  }
}

Tensor decoder_layer(Tensor x, std::vector<Tensor> packed, std::vector<Tensor> biases,
                     std::vector<Tensor> norm_weights, std::vector<Tensor> norm_biases,
                     std::vector<double> eps, int64_t num_heads, Tensor k, Tensor v, int64_t place,
                     Tensor seen, Tensor samples, std::optional<Tensor> prefix,
                     int64_t prefix_keys) {
  constexpr const char* op = "decoder_layer";
  require_rows(x, op);
  const int64_t width = x.size(1), rows = x.size(0);
  require(
      seen.dim() == 3 && samples.dim() == 1 && samples.size(0) > 0 && rows % samples.size(0) == 0,
      op, ": seen must be [S, n, N] and samples divide the ", rows, " rows of x, got ",
      shape_of(seen), " and ", shape_of(samples));
  CachedAttention call;
  call.dtype = dtype_of(x, op, "x");
  call.sequences = samples.size(0);
  call.queries = seen.size(1);
  const int64_t each = rows / call.sequences, skipped = each - call.queries;
  require(call.queries > 0 && skipped >= 0, op, ": seen must name some of the ", each,
          " rows of a sequence, got ", call.queries);
  require_heads(num_heads, width, op);
  take_cache({k, v, seen, samples, prefix, prefix_keys}, x, num_heads, width,
             scale_of(width / num_heads), op, call);
  require(place >= 0 && place + each <= call.keys, op, ": ", each, " rows from ", place,
          " on do not fit into ", call.keys, " places");

  const int64_t asked = call.sequences * call.queries;
  const Parameters own{std::move(packed), std::move(biases), std::move(norm_weights),
                       std::move(norm_biases), std::move(eps)};
  const Ranges of_experts{{0, rows}, {0, asked}, {0, asked}};
  const std::size_t count = layers_of(op, own, of_experts);
  require(count == 1, op, ": takes one layer, got ", count);
  Layer layer(op, x, own, 0, of_experts, rows, asked, false);

  const Tensor projected = layer.project(x, nullptr);
  write_rows(projected, width, each, call.samples, call.sequences, place, k);
  write_rows(projected, 2 * width, each, call.samples, call.sequences, place, v);
  const Tensor o = rows_between(x, asked, width);
  call.q_stride = projected.stride(0);
  call.q_sequence = each * call.q_stride;
  call.q = elements_on(projected.const_data_ptr(), skipped * call.q_stride, call.dtype);
  call.out = o.mutable_data_ptr();
  beit3_fast::cpu::cached_attention(torch_pool(), call);
  const Statistics statistics(asked);
  std::fill_n(statistics.attention, asked, beit3_fast::cpu::kUnmeasured);
  const Tensor queries = skipped > 0 ? last_rows(x, call.sequences, call.queries) : x;
  return layer.rest(o, false, queries, true, statistics);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(beit3_fast, m) {
  m.def(
      "encoder_layers(Tensor x, Tensor[] packed, Tensor[] biases, Tensor[] norm_weights, "
      "Tensor[] norm_biases, float[] eps, int[] bounds, int[] own_bounds, int[] ffn_bounds, "
      "int num_heads, Tensor[] last_weights, Tensor[] last_biases, float[] last_eps, "
      "int[] last_bounds, str mask, Tensor cu_vision, Tensor cu_text, Tensor? rows=None, "
      "Tensor? cu_vision_q=None, Tensor? cu_text_q=None, Tensor? positions_q=None, "
      "int? most_rows=None) -> Tensor");
  m.def(
      "decoder_layer(Tensor x, Tensor[] packed, Tensor[] biases, Tensor[] norm_weights, "
      "Tensor[] norm_biases, float[] eps, int num_heads, Tensor(a!) k, Tensor(b!) v, int place, "
      "Tensor seen, Tensor samples, Tensor? prefix=None, int prefix_keys=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CPU, m) {
  m.impl("encoder_layers", TORCH_BOX(&encoder_layers));
  m.impl("decoder_layer", TORCH_BOX(&decoder_layer));
}
