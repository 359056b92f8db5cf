// Attention of several heads, forward and backward, on bf16: softmax(Q K^T / sqrt(width)) V for each head.
//
// The scores of four queries against all keys fit the first-level cache here, so nothing is streamed: each block of
// four queries sees its whole softmax at once. The backward pass keeps the probabilities of one head.

#include <cmath>
#include <tuple>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "simd.h"

namespace nano {
namespace {

// Queries that are worked on at a time.
constexpr int64_t kBlock = 4;
// Score of a key that is only padding.
constexpr float kNever = -1e30f;

// Sizes of one call. Queries are (batch, queries, channels), keys and values (batch, keys, channels); the channels of
// a head lie together. Padded sizes are the next multiples of sixteen.
struct Sizes {
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t channels;
  int64_t width;
  int64_t padded_keys;
  int64_t padded_width;
  float scale;

  // Returns where a head's first query (or output) begins.
  int64_t query_offset(int64_t sample, int64_t head) const {
    return sample * queries * channels + head * width;
  }

  // Returns where a head's first key (or value) begins.
  int64_t key_offset(int64_t sample, int64_t head) const {
    return sample * keys * channels + head * width;
  }
};

// Checks that a tensor is one that the kernels can read.
void check_operand(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU, not on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, name, " must be bfloat16, not ", tensor.scalar_type());
  TORCH_CHECK(tensor.dim() == 3, name, " must be (batch, length, channels), not ", tensor.sizes());
}

// Checks dtypes and shapes of query (B, S, C), key and value (B, T, C), and returns the sizes of the call.
Sizes measure(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t heads) {
  check_operand(query, "query");
  check_operand(key, "key");
  check_operand(value, "value");
  const int64_t batch = query.size(0);
  const int64_t queries = query.size(1);
  const int64_t channels = query.size(2);
  const int64_t keys = key.size(1);
  TORCH_CHECK(
      key.size(0) == batch && key.size(2) == channels,
      "key must have the batch and channels of query ", query.sizes(), ", and is ", key.sizes());
  TORCH_CHECK(value.sizes() == key.sizes(), "value must have key's shape ", key.sizes(), ", and is ", value.sizes());
  TORCH_CHECK(keys > 0, "attention needs at least one key");
  TORCH_CHECK(
      heads > 0 && channels > 0 && channels % (2 * heads) == 0,
      "each head needs an even number of channels; there are ", channels, " channels for ", heads, " heads");
  TORCH_CHECK(queries % kBlock == 0, "the number of queries must be a multiple of ", kBlock, ", and is ", queries);
  const int64_t width = channels / heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  return {
      batch, heads, queries, keys, channels, width, round_up(keys, kLanes), round_up(width, kLanes), scale};
}

// Packs rows (count, width), `stride` apart, as the panel of their transpose: [width / 2][padded_count][2], pairs along
// the width. Columns beyond `count` are zero.
void pack_transposed(
    const BFloat16* rows, int64_t stride, int64_t count, int64_t width, int64_t padded_count, BFloat16* panel) {
  const int64_t pairs = width / 2;
  for (int64_t i = 0; i < count; i++) {
    const BFloat16* row = rows + i * stride;
    for (int64_t k = 0; k < pairs; k++) {
      store_pair(panel + 2 * (k * padded_count + i), load_pair(row + 2 * k));
    }
  }
  for (int64_t k = 0; k < pairs; k++) {
    for (int64_t i = count; i < padded_count; i++) {
      store_pair(panel + 2 * (k * padded_count + i), 0);
    }
  }
}

// Packs rows (count, width), `stride` apart, as a panel: [padded_count / 2][padded_width][2], pairs of neighbouring
// rows. Rows beyond `count` and columns beyond `width` are zero.
void pack_rows(
    const BFloat16* rows,
    int64_t stride,
    int64_t count,
    int64_t width,
    int64_t padded_count,
    int64_t padded_width,
    BFloat16* panel) {
  for (int64_t i = 0; i < padded_count; i += 2) {
    const BFloat16* first = rows + i * stride;
    const BFloat16* second = first + stride;
    for (int64_t j = 0; j < padded_width; j += kLanes) {
      const __mmask16 mask = first_lanes(width - j);
      const __mmask16 first_mask = i < count ? mask : 0;
      const __mmask16 second_mask = i + 1 < count ? mask : 0;
      const __m512i pairs = interleave(
          _mm256_maskz_loadu_epi16(first_mask, first + j), _mm256_maskz_loadu_epi16(second_mask, second + j));
      _mm512_storeu_si512(panel + i * padded_width + 2 * j, pairs);
    }
  }
}

// Stores `count` rows of fp32, [count][padded_width], as bf16 rows of `width` numbers, `stride` apart. If factors are
// given, row r is multiplied with factors[r].
void store_rows(
    const float* rows,
    int64_t padded_width,
    int64_t count,
    int64_t width,
    const float* factors,
    BFloat16* to,
    int64_t stride) {
  for (int64_t r = 0; r < count; r++) {
    const __m512 factor = broadcast(factors == nullptr ? 1.0f : factors[r]);
    for (int64_t j = 0; j < width; j += kLanes) {
      const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(rows + r * padded_width + j), factor);
      store_bf16(to + r * stride + j, x, first_lanes(width - j));
    }
  }
}

// Marks the scores of one query, [padded_keys], against padding, so that their probability vanishes. The padding lies
// in the last register, which is written whole: it is read again at once, and a part would have to be waited for.
inline void hide_padding(float* scores, const Sizes& sizes) {
  if (sizes.keys == sizes.padded_keys) {
    return;
  }
  const int64_t last = sizes.padded_keys - kLanes;
  const __mmask16 keys = first_lanes(sizes.keys - last);
  _mm512_storeu_ps(scores + last, _mm512_mask_blend_ps(keys, broadcast(kNever), _mm512_loadu_ps(scores + last)));
}

// Computes the softmax of one query's scores [padded_keys] (Q K^T, not yet scaled), up to its divisor: writes
// e^(scale s - m) as bf16, m the largest scaled score. Returns the sum of these numbers, `largest` becomes m.
float exponentiate(const float* scores, const Sizes& sizes, BFloat16* weights, float& largest) {
  __m512 highest = _mm512_loadu_ps(scores);
  for (int64_t t = kLanes; t < sizes.padded_keys; t += kLanes) {
    highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + t));
  }
  largest = _mm512_reduce_max_ps(highest) * sizes.scale;
  const __m512 scale = broadcast(sizes.scale);
  const __m512 shift = broadcast(largest);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < sizes.padded_keys; t += kLanes) {
    const __m512 weight = vexp(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t), scale, shift));
    sum = _mm512_add_ps(sum, weight);
    store_bf16(weights + t, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

// Working memory of one thread in the forward pass.
struct ForwardBuffers {
  Buffer<BFloat16> key_panel;    // K^T: [width / 2][padded_keys][2]
  Buffer<BFloat16> value_panel;  // V: [padded_keys / 2][padded_width][2]
  Buffer<BFloat16> weights;      // softmax without its divisor: [kBlock][padded_keys]
  Buffer<float> scores;          // Q K^T: [kBlock][padded_keys]
  Buffer<float> out;             // [kBlock][padded_width]

  explicit ForwardBuffers(const Sizes& sizes)
      : key_panel(make_buffer<BFloat16>(sizes.width * sizes.padded_keys)),
        value_panel(make_buffer<BFloat16>(sizes.padded_keys * sizes.padded_width)),
        weights(make_buffer<BFloat16>(kBlock * sizes.padded_keys)),
        scores(make_buffer<float>(kBlock * sizes.padded_keys)),
        out(make_buffer<float>(kBlock * sizes.padded_width)) {}
};

// Computes one head: out = softmax(scale Q K^T) V, and log_sum[s] = log sum over t of e^(scale Q_s K_t).
// query and out: (queries, width), key and value: (keys, width), all with rows `channels` apart; log_sum: (queries).
void forward_head(
    const Sizes& sizes,
    const BFloat16* query,
    const BFloat16* key,
    const BFloat16* value,
    BFloat16* out,
    float* log_sum,
    ForwardBuffers& buffers) {
  const int64_t stride = sizes.channels;
  pack_transposed(key, stride, sizes.keys, sizes.width, sizes.padded_keys, buffers.key_panel.get());
  pack_rows(
      value, stride, sizes.keys, sizes.width, sizes.padded_keys, sizes.padded_width, buffers.value_panel.get());
  for (int64_t s = 0; s < sizes.queries; s += kBlock) {
    const PairedRows queries{query + s * stride, stride, 2};
    multiply<kBlock>(
        queries, buffers.key_panel.get(), sizes.padded_keys, sizes.width / 2, buffers.scores.get());
    float inverse_sums[kBlock];
    for (int64_t r = 0; r < kBlock; r++) {
      float* scores = buffers.scores.get() + r * sizes.padded_keys;
      hide_padding(scores, sizes);
      float largest;
      const float sum = exponentiate(scores, sizes, buffers.weights.get() + r * sizes.padded_keys, largest);
      inverse_sums[r] = 1.0f / sum;
      log_sum[s + r] = largest + std::log(sum);
    }
    const PairedRows weights{buffers.weights.get(), sizes.padded_keys, 2};
    multiply<kBlock>(
        weights, buffers.value_panel.get(), sizes.padded_width, sizes.padded_keys / 2, buffers.out.get());
    store_rows(
        buffers.out.get(), sizes.padded_width, kBlock, sizes.width, inverse_sums, out + s * stride, stride);
  }
}

// Returns the product of two rows of bf16, added up in fp32.
float dot(const BFloat16* a, const BFloat16* b, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < width; j += kLanes) {
    const __mmask16 mask = first_lanes(width - j);
    sum = _mm512_fmadd_ps(load_bf16(a + j, mask), load_bf16(b + j, mask), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// Probabilities of sixteen keys and the gradient of their scores, both bf16.
struct ScoreGradient {
  __m256i probability;
  __m256i gradient;
};

// Returns P = e^(scale s - log_sum) and dS = scale P (dP - delta) for one query and sixteen keys. dS is the gradient
// of Q K^T before scaling.
// Source: Dao 2023, FlashAttention-2, arXiv:2307.08691, sections 2.3 and 3.1, algorithm 2; delta is its D.
inline ScoreGradient score_gradient(
    const float* scores, const float* probability_gradients, __m512 scale, __m512 log_sum, __m512 delta) {
  const __m512 probability = vexp(_mm512_fmsub_ps(_mm512_loadu_ps(scores), scale, log_sum));
  const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(probability_gradients), delta);
  const __m512 gradient = _mm512_mul_ps(_mm512_mul_ps(probability, scale), centred);
  return {narrow(probability), narrow(gradient)};
}

// Working memory of one thread in the backward pass.
struct BackwardBuffers {
  Buffer<BFloat16> key_columns;          // K^T: [width / 2][padded_keys][2]
  Buffer<BFloat16> value_columns;        // V^T: [width / 2][padded_keys][2]
  Buffer<BFloat16> key_panel;            // K: [padded_keys / 2][padded_width][2]
  Buffer<BFloat16> query_panel;          // Q: [queries / 2][padded_width][2]
  Buffer<BFloat16> gradient_panel;       // dO: [queries / 2][padded_width][2]
  Buffer<BFloat16> probabilities;        // P, pairs of queries: [queries / 2][padded_keys][2]
  Buffer<BFloat16> score_gradients;      // dS, pairs of queries: [queries / 2][padded_keys][2]
  Buffer<BFloat16> block_gradients;      // dS of the block, pairs of keys: [kBlock][padded_keys]
  Buffer<float> scores;                  // Q K^T of the block: [kBlock][padded_keys]
  Buffer<float> probability_gradients;   // dP of the block: [kBlock][padded_keys]
  Buffer<float> out;                     // [kBlock][padded_width]

  explicit BackwardBuffers(const Sizes& sizes)
      : key_columns(make_buffer<BFloat16>(sizes.width * sizes.padded_keys)),
        value_columns(make_buffer<BFloat16>(sizes.width * sizes.padded_keys)),
        key_panel(make_buffer<BFloat16>(sizes.padded_keys * sizes.padded_width)),
        query_panel(make_buffer<BFloat16>(sizes.queries * sizes.padded_width)),
        gradient_panel(make_buffer<BFloat16>(sizes.queries * sizes.padded_width)),
        probabilities(make_buffer<BFloat16>(sizes.queries * sizes.padded_keys)),
        score_gradients(make_buffer<BFloat16>(sizes.queries * sizes.padded_keys)),
        block_gradients(make_buffer<BFloat16>(kBlock * sizes.padded_keys)),
        scores(make_buffer<float>(kBlock * sizes.padded_keys)),
        probability_gradients(make_buffer<float>(kBlock * sizes.padded_keys)),
        out(make_buffer<float>(kBlock * sizes.padded_width)) {}
};

// One head's tensors in the backward pass. query, out, gradient and d_query: (queries, width), key, value, d_key and
// d_value: (keys, width), all with rows `channels` apart; log_sum: (queries).
struct BackwardHead {
  const BFloat16* query;
  const BFloat16* key;
  const BFloat16* value;
  const BFloat16* out;
  const BFloat16* gradient;
  const float* log_sum;
  BFloat16* d_query;
  BFloat16* d_key;
  BFloat16* d_value;
};

// Turns the block's scores and dP (in the buffers) into P and dS, for the queries s and s + 1, rows r and r + 1 of the
// block. Two at a time, because P and dS are kept in pairs of queries for the sums over queries.
// Formula: delta = rowsum(dO * O), the rest as in score_gradient.
void differentiate_two_queries(
    const Sizes& sizes, const BackwardHead& head, int64_t s, int64_t r, BackwardBuffers& buffers) {
  const int64_t padded_keys = sizes.padded_keys;
  float* scores[2];
  const float* probability_gradients[2];
  BFloat16* block_gradients[2];
  __m512 log_sum[2];
  __m512 delta[2];
  for (int64_t i = 0; i < 2; i++) {
    const int64_t row = (s + i) * sizes.channels;
    delta[i] = broadcast(dot(head.gradient + row, head.out + row, sizes.width));
    log_sum[i] = broadcast(head.log_sum[s + i]);
    scores[i] = buffers.scores.get() + (r + i) * padded_keys;
    probability_gradients[i] = buffers.probability_gradients.get() + (r + i) * padded_keys;
    block_gradients[i] = buffers.block_gradients.get() + (r + i) * padded_keys;
    hide_padding(scores[i], sizes);
  }
  BFloat16* probabilities = buffers.probabilities.get() + s * padded_keys;
  BFloat16* score_gradients = buffers.score_gradients.get() + s * padded_keys;
  const __m512 scale = broadcast(sizes.scale);
  for (int64_t t = 0; t < padded_keys; t += kLanes) {
    const ScoreGradient first =
        score_gradient(scores[0] + t, probability_gradients[0] + t, scale, log_sum[0], delta[0]);
    const ScoreGradient second =
        score_gradient(scores[1] + t, probability_gradients[1] + t, scale, log_sum[1], delta[1]);
    _mm512_storeu_si512(probabilities + 2 * t, interleave(first.probability, second.probability));
    _mm512_storeu_si512(score_gradients + 2 * t, interleave(first.gradient, second.gradient));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block_gradients[0] + t), first.gradient);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block_gradients[1] + t), second.gradient);
  }
}

// Computes one head's gradients: dP = dO V^T, dQ = dS K, dV = P^T dO, dK = dS^T Q; P and dS as in score_gradient.
// Source: Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2, with one block of all keys.
void backward_head(const Sizes& sizes, const BackwardHead& head, BackwardBuffers& buffers) {
  const int64_t stride = sizes.channels;
  const int64_t width = sizes.width;
  const int64_t padded_keys = sizes.padded_keys;
  const int64_t padded_width = sizes.padded_width;
  float* out = buffers.out.get();
  pack_transposed(head.key, stride, sizes.keys, width, padded_keys, buffers.key_columns.get());
  pack_transposed(head.value, stride, sizes.keys, width, padded_keys, buffers.value_columns.get());
  pack_rows(head.key, stride, sizes.keys, width, padded_keys, padded_width, buffers.key_panel.get());
  pack_rows(head.query, stride, sizes.queries, width, sizes.queries, padded_width, buffers.query_panel.get());
  pack_rows(head.gradient, stride, sizes.queries, width, sizes.queries, padded_width, buffers.gradient_panel.get());
  for (int64_t s = 0; s < sizes.queries; s += kBlock) {
    const PairedRows queries{head.query + s * stride, stride, 2};
    const PairedRows gradients{head.gradient + s * stride, stride, 2};
    multiply<kBlock>(queries, buffers.key_columns.get(), padded_keys, width / 2, buffers.scores.get());
    multiply<kBlock>(
        gradients, buffers.value_columns.get(), padded_keys, width / 2, buffers.probability_gradients.get());
    for (int64_t r = 0; r < kBlock; r += 2) {
      differentiate_two_queries(sizes, head, s + r, r, buffers);
    }
    const PairedRows score_gradients{buffers.block_gradients.get(), padded_keys, 2};
    multiply<kBlock>(score_gradients, buffers.key_panel.get(), padded_width, padded_keys / 2, out);
    store_rows(out, padded_width, kBlock, width, nullptr, head.d_query + s * stride, stride);
  }
  for (int64_t t = 0; t < sizes.keys; t += kBlock) {  // padded_keys is a multiple of kBlock: all rows can be read
    const int64_t count = std::min(kBlock, sizes.keys - t);
    const PairedRows probabilities{buffers.probabilities.get() + 2 * t, 2, 2 * padded_keys};
    multiply<kBlock>(probabilities, buffers.gradient_panel.get(), padded_width, sizes.queries / 2, out);
    store_rows(out, padded_width, count, width, nullptr, head.d_value + t * stride, stride);
    const PairedRows score_gradients{buffers.score_gradients.get() + 2 * t, 2, 2 * padded_keys};
    multiply<kBlock>(score_gradients, buffers.query_panel.get(), padded_width, sizes.queries / 2, out);
    store_rows(out, padded_width, count, width, nullptr, head.d_key + t * stride, stride);
  }
}

// Computes softmax(Q K^T / sqrt(C / heads)) V for each head. query: (B, S, C) bf16, S a multiple of 4; key and value:
// (B, T, C) bf16. Returns out (B, S, C) bf16 and log_sum (B, heads, S) fp32, which the backward pass needs.
// Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; log_sum is L in Dao 2023, arXiv:2307.08691, algorithm 1.
std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t heads) {
  const Sizes sizes = measure(query, key, value, heads);
  const at::Tensor q = query.contiguous();
  const at::Tensor k = key.contiguous();
  const at::Tensor v = value.contiguous();
  const at::Tensor out = at::empty_like(q);
  const at::Tensor log_sum = at::empty({sizes.batch, heads, sizes.queries}, q.options().dtype(at::kFloat));
  const BFloat16* q_data = q.const_data_ptr<BFloat16>();
  const BFloat16* k_data = k.const_data_ptr<BFloat16>();
  const BFloat16* v_data = v.const_data_ptr<BFloat16>();
  BFloat16* out_data = out.mutable_data_ptr<BFloat16>();
  float* log_sum_data = log_sum.mutable_data_ptr<float>();
  at::parallel_for(0, sizes.batch * heads, 1, [&](int64_t begin, int64_t end) {
    ForwardBuffers buffers(sizes);
    for (int64_t i = begin; i < end; i++) {
      const int64_t at_query = sizes.query_offset(i / heads, i % heads);
      const int64_t at_key = sizes.key_offset(i / heads, i % heads);
      forward_head(
          sizes,
          q_data + at_query,
          k_data + at_key,
          v_data + at_key,
          out_data + at_query,
          log_sum_data + i * sizes.queries,
          buffers);
    }
  });
  return {out, log_sum};
}

// Computes the gradients of attention_forward. gradient: (B, S, C), converted to bf16; query, key, value, out and
// log_sum as in the forward pass. Returns dQ (B, S, C), dK and dV (B, T, C), all bf16. Formulas: backward_head.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& gradient,
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& out,
    const at::Tensor& log_sum,
    int64_t heads) {
  const Sizes sizes = measure(query, key, value, heads);
  check_operand(out, "out");
  TORCH_CHECK(out.sizes() == query.sizes(), "out must have query's shape ", query.sizes(), ", and is ", out.sizes());
  TORCH_CHECK(
      gradient.sizes() == query.sizes(),
      "gradient must have query's shape ", query.sizes(), ", and is ", gradient.sizes());
  TORCH_CHECK(
      log_sum.scalar_type() == at::kFloat && log_sum.is_contiguous() &&
          log_sum.sizes() == at::IntArrayRef({sizes.batch, heads, sizes.queries}),
      "log_sum must be what attention_forward returned for this query, and is ",
      log_sum.scalar_type(), " ", log_sum.sizes());
  const at::Tensor q = query.contiguous();
  const at::Tensor k = key.contiguous();
  const at::Tensor v = value.contiguous();
  const at::Tensor o = out.contiguous();
  const at::Tensor d_out = gradient.to(at::kBFloat16).contiguous();
  const at::Tensor d_query = at::empty_like(q);
  const at::Tensor d_key = at::empty_like(k);
  const at::Tensor d_value = at::empty_like(v);
  const BackwardHead whole{
      q.const_data_ptr<BFloat16>(),
      k.const_data_ptr<BFloat16>(),
      v.const_data_ptr<BFloat16>(),
      o.const_data_ptr<BFloat16>(),
      d_out.const_data_ptr<BFloat16>(),
      log_sum.const_data_ptr<float>(),
      d_query.mutable_data_ptr<BFloat16>(),
      d_key.mutable_data_ptr<BFloat16>(),
      d_value.mutable_data_ptr<BFloat16>()};
  at::parallel_for(0, sizes.batch * heads, 1, [&](int64_t begin, int64_t end) {
    BackwardBuffers buffers(sizes);
    for (int64_t i = begin; i < end; i++) {
      const int64_t at_query = sizes.query_offset(i / heads, i % heads);
      const int64_t at_key = sizes.key_offset(i / heads, i % heads);
      const BackwardHead head{
          whole.query + at_query,
          whole.key + at_key,
          whole.value + at_key,
          whole.out + at_query,
          whole.gradient + at_query,
          whole.log_sum + i * sizes.queries,
          whole.d_query + at_query,
          whole.d_key + at_key,
          whole.d_value + at_key};
      backward_head(sizes, head, buffers);
    }
  });
  return {d_query, d_key, d_value};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nano, library) {
  library.def("attention_forward(Tensor query, Tensor key, Tensor value, int heads) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sum, "
      "int heads) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(nano, CPU, library) {
  library.impl("attention_forward", &attention_forward);
  library.impl("attention_backward", &attention_backward);
}

}  // namespace nano
