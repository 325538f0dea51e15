// What an instruction-set level offers to the schedulers: plain structures and function pointers.
//
// This header is included by translation units compiled with different instruction sets, so it
// holds no inline function and includes nothing that would emit one.
#pragma once

#include <cstdint>

namespace beit3_fast::cpu {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };  // kInt8: weights only
enum class Activation : int32_t { kNone, kGelu };
enum class Mask : int32_t { kBidirectional, kSeq2Seq, kCausal };

// Matrix operands are cut along their depth into 4-byte units: one fp32, two neighbouring bf16 or
// four int8.
//   B (packed weights, keys, values): panels of kPanel columns, [units][kPanel] words each.
//   A (rows): tiles of some rows (Arch::kTileRows at most), [chunks][rows][kChunk units], or three
//             times as much where an fp32 number is taken apart (amx_float32.h).
// The depth is padded with zeros to whole chunks.
// An int8 weight is q[o, i] = round(w[o, i] * (127 / max |w[o, :]|)), to nearest even, and s[o] =
// max |w[o, :]| / 127. Behind its last panel follow s and 128 times the sums of the columns of B
// (int32), both padded to whole panels. Rows that meet it are rounded likewise, each by its own
// scale.
constexpr int64_t kPanel = 32;
constexpr int64_t kChunk = 16;

// A matrix [R, C] of rows may lie in strips of so many columns: [ceil(C / kStrip)][R][kStrip]. Rows
// of a matrix that is not cut are such strips with a distance of kStrip between them.
constexpr int64_t kStrip = 64;

// Of the numbers of a row: their mean, which is centre + offset, and their variance, which is
// negative where nobody has measured them.
struct RowStatistics {
  float centre;
  float offset;
  float variance;
};
constexpr RowStatistics kUnmeasured = {0.0f, 0.0f, -1.0f};

// Rows [first, first + count) of the sorted rows, all of one expert, against panels
// [panel_begin, panel_end) of its weight.
struct LinearBlock {
  const void* x;  // overlaps neither out nor bare: it may be read when they are written
  int64_t x_stride;
  int64_t x_strip = kStrip;  // elements from strip to strip
  const void* residual;      // may be null
  int64_t residual_stride;
  int64_t residual_strip = kStrip;
  void* out;
  int64_t out_stride;
  int64_t out_strip = kStrip;
  void* bare;  // what lies in out before the residual is added, at the same places; or null
  const int64_t* rows;  // sorted row -> row of x, residual and out; null: the identity
  // Of the rows of x, by those that wrote them, and where those of out go, which are left only
  // where all panels are taken; null: none.
  const RowStatistics* x_statistics;
  RowStatistics* statistics;
  int64_t first;
  int64_t count;
  int64_t in_features;
  int64_t out_features;
  // The panels of the weight, in parts of part_panels panels each.
  const uint32_t* const* parts;
  int64_t part_panels;
  int64_t panel_begin;
  int64_t panel_end;
  // fp32, padded with zeros to whole chunks (norm) and panels (bias); null: absent.
  const float* bias;
  const float* norm_weight;
  const float* norm_bias;
  float eps;
  Activation activation;
};

// Rows of `width` numbers to be normalised, all by one weight and bias (fp32, padded with zeros to
// whole vectors of 16).
struct NormBlock {
  const void* x;
  int64_t x_stride;
  void* out;
  int64_t out_stride;
  int64_t count;
  int64_t width;
  const float* weight;
  const float* bias;
  float eps;
};

// Rows of `width` numbers, in strips or not, and where their statistics go.
struct StatisticsBlock {
  const void* x;
  int64_t x_stride;
  int64_t x_strip = kStrip;
  int64_t count;
  int64_t width;
  RowStatistics* out;
};

// The gradients of so many rows of LayerNorm, given those of its results.
struct NormGradientsBlock {
  const void* x;
  int64_t x_stride;
  const void* grad;
  int64_t grad_stride;
  void* x_grad;
  int64_t x_grad_stride;
  int64_t count;
  int64_t width;
  const float* weight;  // padded with zeros to whole vectors of 16, as are the sums
  // What these rows give to the gradients of weight and bias.
  float* weight_grad;
  float* bias_grad;
  float eps;
};

// Queries [begin, end) of one (sample, head). A sample's queries and keys are numbered vision
// first.
struct AttentionBlock {
  const void* q;  // row 0 of the head's columns
  const void* k;
  const void* v;
  void* out;
  int64_t q_stride;
  int64_t k_stride;
  int64_t v_stride;
  int64_t out_stride;
  int64_t head_dim;
  int64_t key_vision_row;
  int64_t key_text_row;
  int64_t vision_keys;
  int64_t text_keys;
  int64_t query_vision_row;
  int64_t query_text_row;
  int64_t vision_queries;
  int64_t text_queries;
  const int32_t* positions;  // of each query row of q inside its segment; null: its index there
  // Whether a query sees a key, among those that the mask lets it see: rows of queries,
  // `seen_stride` apart, by their positions, and columns of keys, text from `seen_text` on in both.
  // Null: all.
  const unsigned char* seen;
  int64_t seen_stride;
  int64_t seen_text;
  // Keys in front of those, which every query sees, and their values, packed as B; null: none. They
  // come with `seen`.
  const uint32_t* packed_keys;
  const uint32_t* packed_values;
  int64_t packed_count;
  int64_t begin;
  int64_t end;
  float scale;
  Mask mask;
};

// All queries and keys of one (sample, head), the gradient of its result, and where those of its
// operands go: rows of `grad_width` elements.
struct AttentionGradientsBlock : AttentionBlock {
  const void* grad;
  int64_t grad_stride;
  void* q_grad;
  void* k_grad;
  void* v_grad;
  int64_t grad_width;
};

// Logits of one row, and whether each class may be chosen (not zero; null: all may).
struct LogitsBlock {
  const void* logits;
  const unsigned char* allowed;
  int64_t count;
  int64_t first;  // the class of the first
  int64_t wanted;
};

// Of a LogitsBlock: the highest, the sum of exp(logit - top), and those of the highest that may be
// chosen with their classes, best first, of equals the lower class.
struct LogitsSummary {
  float top;
  float sum;
  int64_t found;  // at most the block's `wanted`, for which there is room
  float* scores;
  int64_t* classes;
};

// Rows that share a block of B while it is near, if not the level says otherwise. The slice of them
// that meets it fits the L2 cache.
constexpr int64_t kBlockRows = 192;

// Of expert_linear: the most rows of a block and of a tile in it, and whether blocks should be as
// few as that allows, x and the result in strips where nobody else reads them.
struct LinearKernels {
  int64_t (*most_rows)(int64_t in_features);
  int64_t tile_rows;
  bool high_blocks;
  int64_t (*scratch)(const LinearBlock& block);
  void (*block)(const LinearBlock& block, void* scratch);
};

struct Kernels {
  const char* isa;
  LinearKernels linear;
  int64_t (*attention_scratch)(const AttentionBlock& block);
  void (*attention_block)(const AttentionBlock& block, void* scratch);
  int64_t (*gradients_scratch)(const AttentionGradientsBlock& block);
  void (*gradients_block)(const AttentionGradientsBlock& block, void* scratch);
  // `repeats` times the products of the block's first tile of rows with its first columns: nothing
  // but the innermost loop, on operands that stay in the nearest cache. Returns how many results
  // that tile has.
  int64_t (*product_scratch)(const LinearBlock& block);
  int64_t (*product_loop)(const LinearBlock& block, int64_t repeats, void* scratch);
  // One panel of B whose column j is rows[j]; columns from `count` on are zero.
  void (*pack_panel)(const void* const* rows, int64_t count, int64_t depth, uint32_t* panel);
  // One panel of B whose depth runs over rows: columns [from, from + kPanel) of `depth` rows of x;
  // those from `columns` on are zero.
  void (*pack_transposed)(const void* x, int64_t stride, int64_t depth, int64_t columns,
                          int64_t from, uint32_t* panel);
  void (*likeliest)(const LogitsBlock& block, LogitsSummary* out);
  void (*row_statistics)(const StatisticsBlock& block);
  void (*layer_norm)(const NormBlock& block);
  void (*layer_norm_gradients)(const NormGradientsBlock& block);
  // Columns [from, from + kPanel) of `rows` rows of x, those below `columns`, as rows of out.
  void (*transpose)(const void* x, int64_t stride, int64_t rows, int64_t columns, int64_t from,
                    void* out, int64_t out_stride);
};

// Null where the translation unit was built without the instruction set.
const Kernels* portable_kernels(DType dtype);
const Kernels* avx2_kernels(DType dtype);
const Kernels* avx512_kernels(DType dtype);
const Kernels* avx512bf16_kernels(DType dtype);
const Kernels* amx_kernels(DType dtype);

// For int8 weights and rows of a dtype: only `linear`, product_scratch and product_loop.
const Kernels* portable_int8_kernels(DType rows);
const Kernels* avx2_int8_kernels(DType rows);
const Kernels* avx512_int8_kernels(DType rows);
const Kernels* avx512vnni_int8_kernels(DType rows);
const Kernels* amx_int8_kernels(DType rows);

}  // namespace beit3_fast::cpu
