#include "likeliest.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "elements.h"
#include "isa.h"

namespace beit3_fast::cpu {
namespace {

// A row in parts of so many classes: their logits stay in the nearest cache for the second look.
constexpr int64_t kPart = 8192;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Parts {
  int64_t count;
  int64_t wanted;
  std::vector<LogitsSummary> summaries;
  std::vector<float> scores;
  std::vector<int64_t> classes;

  Parts(const Likeliest& op)
      : count(ceil_div(op.classes, kPart)),
        wanted(op.wanted),
        summaries(static_cast<std::size_t>(op.rows * count)),
        scores(summaries.size() * static_cast<std::size_t>(wanted)),
        classes(scores.size()) {
    for (std::size_t i = 0; i < summaries.size(); ++i) {
      summaries[i].scores = scores.data() + i * static_cast<std::size_t>(wanted);
      summaries[i].classes = classes.data() + i * static_cast<std::size_t>(wanted);
    }
  }
};

void merge(const Likeliest& op, const LogitsSummary* parts, int64_t count, int64_t row) {
  float top = kLowest;
  for (int64_t p = 0; p < count; ++p) top = std::max(top, parts[p].top);
  double sum = 0.0;
  for (int64_t p = 0; p < count; ++p) {
    // of no part that is empty: -inf less -inf is not a number
    if (parts[p].top > kLowest) sum += double{parts[p].sum} * std::exp(double{parts[p].top} - top);
    // what is not a number may have hidden from the maximum
    if (parts[p].sum != parts[p].sum) sum = parts[p].sum;
  }
  const auto total = static_cast<float>(std::log(sum));
  float* const log_p = op.log_p + row * op.wanted;
  int64_t* const chosen = op.chosen + row * op.wanted;
  std::vector<int64_t> next(static_cast<std::size_t>(count), 0);
  int64_t found = 0;
  for (; found < op.wanted; ++found) {
    int64_t best = -1;
    for (int64_t p = 0; p < count; ++p) {
      if (next[p] == parts[p].found) continue;
      if (best < 0 || parts[p].scores[next[p]] > parts[best].scores[next[best]]) best = p;
    }
    if (best < 0) break;
    log_p[found] = parts[best].scores[next[best]] - top - total;
    chosen[found] = parts[best].classes[next[best]++];
  }
  for (int64_t c = 0; found < op.wanted; ++c) {
    if (op.allowed[c] != 0) continue;
    log_p[found] = kLowest;
    chosen[found++] = c;
  }
}

}  // namespace

void likeliest(const Pool& pool, const Likeliest& op) {
  const Kernels& level = kernels(op.dtype);
  Parts parts(op);
  share(pool, op.rows * parts.count, [&](int64_t task) {
    const int64_t row = task / parts.count, first = task % parts.count * kPart;
    const LogitsBlock block{
        elements_on(op.logits, row * op.stride + first, op.dtype),
        op.allowed == nullptr ? nullptr : op.allowed + first,
        std::min(kPart, op.classes - first),
        first,
        op.wanted,
    };
    level.likeliest(block, &parts.summaries[static_cast<std::size_t>(task)]);
  });
  for (int64_t row = 0; row < op.rows; ++row) {
    merge(op, &parts.summaries[static_cast<std::size_t>(row * parts.count)], parts.count, row);
  }
}

}  // namespace beit3_fast::cpu
