// The launchers of csrc/cuda/ as plain loops on the CPU: what the binding hands over is all they
// read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/decode_attention.h"
#include "cuda/expert_linear.h"
#include "cuda/head_top_k.h"
#include "cuda/row_statistics.h"
#include "cuda/shared_attention.h"

namespace beit3_fast::cuda {
namespace {

double from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double size =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

double from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value = 0;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Rows of 16-bit numbers.
template <class Element>
struct Rows {
  const void* data;
  int64_t stride;
  Element element;

  double at(int64_t row, int64_t column) const {
    const uint16_t bits = static_cast<const uint16_t*>(data)[row * stride + column];
    return element == Element::kBFloat16 ? from_bfloat16(bits) : from_half(bits);
  }
  void put(int64_t row, int64_t column, double value) const {
    uint16_t best = 0;
    const auto bits_of = [&](uint32_t bits) { return static_cast<uint16_t>(bits); };
    if (element == Element::kBFloat16) {
      const auto single = static_cast<float>(value);
      uint32_t wide = 0;
      std::memcpy(&wide, &single, sizeof wide);
      best = bits_of((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    } else {
      const double size = std::fabs(value);
      const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
      const double steps = std::nearbyint(std::ldexp(size, 10 - exponent));
      const double offset = size < 0x1p-14 ? steps : steps + (exponent + 14) * 1024.0;
      best = bits_of(static_cast<uint32_t>(offset) | (value < 0 ? 0x8000u : 0u));
    }
    static_cast<uint16_t*>(const_cast<void*>(data))[row * stride + column] = best;
  }
};

struct Moments {
  double mean, deviation;
};

Moments moments_of(const ExpertLinear& op, int64_t row) {
  double mean = 0, squares = 0;
  const float* parts = op.parts + row * op.num_parts * 2;
  const auto width = [&](int64_t part) {
    return static_cast<double>(std::min(op.part_width, op.in_features - part * op.part_width));
  };
  for (int64_t p = 0; p < op.num_parts; ++p) mean += parts[p * 2] * width(p);
  mean /= static_cast<double>(op.in_features);
  for (int64_t p = 0; p < op.num_parts; ++p) {
    squares += parts[p * 2 + 1] + width(p) * (parts[p * 2] - mean) * (parts[p * 2] - mean);
  }
  return {mean, std::sqrt(squares / static_cast<double>(op.in_features) + op.eps)};
}

// Mean and sum of squared deviations of columns [first, end) of a row.
template <class Element>
void measure(const Rows<Element>& rows, int64_t row, int64_t first, int64_t end, float* part) {
  const auto count = static_cast<double>(end - first);
  double mean = 0, squares = 0;
  for (int64_t k = first; k < end; ++k) mean += rows.at(row, k) / count;
  for (int64_t k = first; k < end; ++k) {
    squares += (rows.at(row, k) - mean) * (rows.at(row, k) - mean);
  }
  part[0] = static_cast<float>(mean);
  part[1] = static_cast<float>(squares);
}

void product_row(const ExpertLinear& op, int64_t expert, int64_t row) {
  using Own = Rows<ExpertLinear::Element>;
  const Own x{op.x, op.x_stride, op.element}, y{op.y, op.y_stride, op.element};
  const Own weights{op.weights, op.in_features, op.element};
  const Own residual{op.residual, op.residual_stride, op.element};
  const Moments own = op.parts != nullptr ? moments_of(op, row) : Moments{0, 1};
  for (int64_t n = 0; n < op.out_features; ++n) {
    const int64_t column = expert * op.out_features + n;
    double sum = 0;
    for (int64_t k = 0; k < op.in_features; ++k) sum += x.at(row, k) * weights.at(column, k);
    if (op.parts != nullptr) sum = (sum - own.mean * op.sums[column]) / own.deviation;
    if (op.biases != nullptr) sum += op.biases[column];
    if (op.gelu) sum *= 0.5 * (1 + std::erf(sum * std::sqrt(0.5)));
    if (op.residual != nullptr) sum += residual.at(row, n);
    y.put(row, n, sum);
  }
  const int64_t width = ExpertLinear::kPartWidth;
  const int64_t parts = (op.out_features + width - 1) / width;
  for (int64_t p = 0; p < parts && op.y_parts != nullptr; ++p) {
    const int64_t end = std::min(op.out_features, (p + 1) * width);
    measure(y, row, p * width, end, op.y_parts + (row * parts + p) * 2);
  }
}

// Where the places of a sample lie: its vision rows, then its text rows.
struct Places {
  const int32_t *vision, *text;
  int64_t sample, batch;

  int64_t num_vision() const { return vision[sample + 1] - vision[sample]; }
  int64_t count() const { return num_vision() + text[sample + 1] - text[sample]; }
  int64_t row(int64_t place) const {
    if (place < num_vision()) return vision[sample] + place;
    return int64_t{vision[batch]} + text[sample] + place - num_vision();
  }
};

void attend(const SharedAttention& op, const Places& keys, const Places& queries, int64_t own,
            int64_t head) {
  using Own = Rows<SharedAttention::Element>;
  const Own q{op.q, op.q_stride, op.element}, k{op.k, op.k_stride, op.element};
  const Own v{op.v, op.v_stride, op.element}, o{op.o, op.o_stride, op.element};
  const int64_t row = queries.row(own), first = head * op.head_dim;
  int64_t place = own;
  if (op.positions_q != nullptr) {
    place = op.positions_q[row] + (own < queries.num_vision() ? 0 : keys.num_vision());
  }
  int64_t limit = keys.count();
  if (op.mask != SharedAttention::Mask::kBidirectional) limit = place + 1;
  if (op.mask == SharedAttention::Mask::kSeq2Seq) limit = std::max(limit, keys.num_vision());
  std::vector<double> weights;
  double total = 0;
  for (int64_t j = 0; j < limit; ++j) {
    double score = 0;
    for (int64_t d = first; d < first + op.head_dim; ++d)
      score += q.at(row, d) * k.at(keys.row(j), d);
    weights.push_back(std::exp(score * op.scale));
    total += weights.back();
  }
  for (int64_t d = first; d < first + op.head_dim; ++d) {
    double sum = 0;
    for (int64_t j = 0; j < limit; ++j) sum += weights[j] * v.at(keys.row(j), d);
    o.put(row, d, sum / total);
  }
  if (op.parts == nullptr) return;
  measure(o, row, first, first + op.head_dim, op.parts + (row * op.num_heads + head) * 2);
}

void attend_cached(const DecodeAttention& op, int64_t sequence, int64_t row, int64_t head) {
  using Own = Rows<DecodeAttention::Element>;
  const int64_t sample = op.samples != nullptr ? op.samples[sequence] : sequence;
  const auto from = [](const void* data, int64_t begin) {
    return static_cast<const uint16_t*>(data) + begin;
  };
  const Own q{from(op.q, sequence * op.q_sequence), op.q_stride, op.element};
  const Own k{from(op.k, sample * op.k_sample), op.k_stride, op.element};
  const Own v{from(op.v, sample * op.v_sample), op.v_stride, op.element};
  const int64_t width = op.num_heads * op.head_dim, first = head * op.head_dim;
  const Own o{from(op.o, (sequence * op.num_rows + row) * width), width, op.element};
  const uint8_t* seen = op.seen + sequence * op.seen_sequence + row * op.seen_stride;
  std::vector<double> weights(op.num_keys);
  double total = 0;
  for (int64_t j = 0; j < op.num_keys; ++j) {
    double score = 0;
    for (int64_t d = first; d < first + op.head_dim; ++d) score += q.at(row, d) * k.at(j, d);
    if (j < op.front || seen[j - op.front] != 0) weights[j] = std::exp(score * op.scale);
    total += weights[j];
  }
  for (int64_t d = first; d < first + op.head_dim; ++d) {
    double sum = 0;
    for (int64_t j = 0; j < op.num_keys; ++j) {
      if (weights[j] > 0) sum += weights[j] * v.at(j, d);
    }
    o.put(0, d, total > 0 ? sum / total : 0.0);
  }
}

void choose(const HeadTopK& op, int64_t row) {
  using Own = Rows<HeadTopK::Element>;
  const Own x{op.x, op.x_stride, op.element}, weight{op.weight, op.features, op.element};
  const Own bias{op.bias, 0, op.element};
  std::vector<std::pair<double, int64_t>> logits;
  double total = 0;
  for (int64_t n = 0; n < op.classes; ++n) {
    double logit = op.bias != nullptr ? bias.at(0, n) : 0.0;
    for (int64_t k = 0; k < op.features; ++k) logit += x.at(row, k) * weight.at(n, k);
    total += std::exp(logit);
    if (op.allowed == nullptr || op.allowed[n] != 0) logits.emplace_back(-logit, n);
  }
  std::sort(logits.begin(), logits.end());
  for (int64_t i = 0; i < op.count; ++i) {
    op.log_p[row * op.count + i] = static_cast<float>(-logits[i].first - std::log(total));
    op.ids[row * op.count + i] = logits[i].second;
  }
}

}  // namespace

const char* row_statistics(const RowStatistics& op, CUstream_st*) {
  const Rows<RowStatistics::Element> x{op.x, op.x_stride, op.element};
  for (int64_t i = 0; i < op.num_rows; ++i) {
    const int64_t row = op.rows != nullptr ? op.rows[i] : i;
    measure(x, row, 0, op.features, op.parts + row * 2);
  }
  return nullptr;
}

const char* expert_linear_obstacle(const ExpertLinear& op) {
  return op.in_features % 8 != 0 ? "planted: takes multiples of 8" : nullptr;
}

const char* expert_linear(const ExpertLinear& op, CUstream_st*) {
  for (int64_t e = 0; e < op.num_experts; ++e) {
    for (int64_t p = op.bounds[e]; p < op.bounds[e + 1]; ++p) {
      product_row(op, e, op.rows != nullptr ? op.rows[p] : p);
    }
  }
  return nullptr;
}

const char* shared_attention_obstacle(const SharedAttention&) { return nullptr; }

const char* shared_attention(const SharedAttention& op, CUstream_st*) {
  for (int64_t sample = 0; sample < op.batch; ++sample) {
    const Places keys{op.cu_vision, op.cu_text, sample, op.batch};
    const Places queries{op.cu_vision_q, op.cu_text_q, sample, op.batch};
    if (keys.count() > op.longest_keys || queries.count() > op.longest_queries) {
      return "planted: longest is too small";
    }
    for (int64_t own = 0; own < queries.count(); ++own) {
      for (int64_t head = 0; head < op.num_heads; ++head) attend(op, keys, queries, own, head);
    }
  }
  return nullptr;
}

const char* decode_attention_obstacle(const DecodeAttention&) { return nullptr; }

const char* decode_attention(const DecodeAttention& op, CUstream_st*) {
  const auto copy = [&](const void* from, int64_t begin, void* to, int64_t place) {
    std::memcpy(static_cast<uint16_t*>(to) + place, static_cast<const uint16_t*>(from) + begin,
                2 * op.num_heads * op.head_dim);
  };
  for (int64_t i = 0; i < op.num_sequences * op.num_new; ++i) {
    const int64_t sequence = i / op.num_new, row = i % op.num_new;
    const int64_t sample = op.samples != nullptr ? op.samples[sequence] : sequence;
    const int64_t key = row + (op.place != nullptr ? *op.place : op.first);
    copy(op.new_k, sequence * op.new_k_sequence + row * op.new_k_stride, op.k,
         sample * op.k_sample + key * op.k_stride);
    copy(op.new_v, sequence * op.new_v_sequence + row * op.new_v_stride, op.v,
         sample * op.v_sample + key * op.v_stride);
  }
  const Rows<DecodeAttention::Element> o{op.o, op.head_dim, op.element};
  for (int64_t i = 0; i < op.num_sequences * op.num_rows * op.num_heads; ++i) {
    const int64_t row = i / op.num_heads;
    attend_cached(op, row / op.num_rows, row % op.num_rows, i % op.num_heads);
    if (op.parts != nullptr) measure(o, i, 0, op.head_dim, op.parts + 2 * i);
  }
  return nullptr;
}

const char* head_top_k_obstacle(const HeadTopK& op) {
  return op.features % 8 != 0 ? "planted: takes multiples of 8" : nullptr;
}

const char* head_top_k(const HeadTopK& op, CUstream_st*) {
  for (int64_t row = 0; row < op.num_rows; ++row) choose(op, row);
  return nullptr;
}

}  // namespace beit3_fast::cuda
