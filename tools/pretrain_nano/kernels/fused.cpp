// GroupNorm (of x plus a vector, then SiLU if asked), LayerNorm and GEGLU, forward and backward, on bf16.
//
// Each reads its input once or twice instead of once per elementary operation. Sums run in fp32 per channel; sums over
// the channels of a group run in fp64.

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "simd.h"

namespace nano {
namespace {

// Rows of LayerNorm whose weight gradients are added up in one sum.
constexpr int64_t kRowsPerSum = 256;
// Rows of GEGLU that a thread takes at a time.
constexpr int64_t kGegluGrain = 64;

// Checks that a tensor is bf16 on the CPU.
void check_bf16(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU, not on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, name, " must be bfloat16, not ", tensor.scalar_type());
}

// Checks that a gradient has the shape of what it belongs to.
void check_gradient(const at::Tensor& gradient, at::IntArrayRef sizes) {
  TORCH_CHECK(gradient.sizes() == sizes, "gradient must have shape ", sizes, ", and has ", gradient.sizes());
}

// Checks that a parameter has one number per channel.
void check_parameter(const at::Tensor& parameter, int64_t channels, const char* name) {
  TORCH_CHECK(
      parameter.dim() == 1 && parameter.size(0) == channels,
      name, " must have shape [", channels, "], one number per channel, and has ", parameter.sizes());
}

// Checks what the backward pass gets from the forward pass.
void check_statistics(const at::Tensor& statistics, at::IntArrayRef sizes) {
  TORCH_CHECK(
      statistics.scalar_type() == at::kFloat && statistics.is_contiguous() && statistics.sizes() == sizes,
      "statistics must be what the forward pass returned, fp32 ", sizes, ", and is ",
      statistics.scalar_type(), " ", statistics.sizes());
}

// Returns a tensor as contiguous fp32.
at::Tensor as_floats(const at::Tensor& tensor) {
  return tensor.to(at::kFloat).contiguous();
}

// ---- GroupNorm ----
//
// x: (B, C, H, W), channels last, so a sample is (S, C) with S = H W. Registers hold sixteen channels of one pixel;
// loops run over the pixels first, then over the channels.

// Sizes of one call.
struct GroupNormSizes {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t groups;

  // Returns the numbers of one group of one sample.
  double group_numbers() const {
    return static_cast<double>(channels / groups) * static_cast<double>(pixels);
  }
};

// Checks dtypes and shapes of x (B, C, H, W), added (B, C) if there is any, weight and bias (C); returns the sizes.
GroupNormSizes measure_group_norm(
    const at::Tensor& x,
    const std::optional<at::Tensor>& added,
    const at::Tensor& weight,
    const at::Tensor& bias,
    int64_t groups) {
  check_bf16(x, "x");
  TORCH_CHECK(x.dim() == 4, "x must be (batch, channels, height, width), not ", x.sizes());
  const int64_t batch = x.size(0);
  const int64_t channels = x.size(1);
  TORCH_CHECK(channels % kLanes == 0, "channels must be a multiple of ", kLanes, ", and are ", channels);
  TORCH_CHECK(
      groups > 0 && channels % groups == 0, channels, " channels cannot be parted into ", groups, " equal groups");
  check_parameter(weight, channels, "weight");
  check_parameter(bias, channels, "bias");
  TORCH_CHECK(
      !added.has_value() || added->sizes() == at::IntArrayRef({batch, channels}),
      "added must be (batch, channels) = [", batch, ", ", channels, "], and is ", added->sizes());
  return {batch, channels, x.size(2) * x.size(3), groups};
}

// Returns the added vectors as fp32 (B, C), zeros if there are none.
at::Tensor added_as_floats(const std::optional<at::Tensor>& added, const GroupNormSizes& sizes) {
  if (added.has_value()) {
    return as_floats(*added);
  }
  return at::zeros({sizes.batch, sizes.channels}, at::TensorOptions().dtype(at::kFloat));
}

// Computes mean and 1 / sqrt(variance + eps) of each group of x + added, written once per channel of the group.
// x: (S, C) of one sample; added, mean, inverse_deviation: (C); sums, square_sums: working memory (C).
void group_statistics(
    const GroupNormSizes& sizes,
    const BFloat16* x,
    const float* added,
    double eps,
    float* sums,
    float* square_sums,
    float* mean,
    float* inverse_deviation) {
  const int64_t channels = sizes.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __m512 shift = _mm512_loadu_ps(added + c);
    __m512 sum = _mm512_setzero_ps();
    __m512 square_sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < sizes.pixels; s++) {
      const __m512 value = _mm512_add_ps(load_bf16(x + s * channels + c), shift);
      sum = _mm512_add_ps(sum, value);
      square_sum = _mm512_fmadd_ps(value, value, square_sum);
    }
    _mm512_storeu_ps(sums + c, sum);
    _mm512_storeu_ps(square_sums + c, square_sum);
  }
  const int64_t group_channels = channels / sizes.groups;
  const double numbers = sizes.group_numbers();
  for (int64_t begin = 0; begin < channels; begin += group_channels) {
    const int64_t end = begin + group_channels;
    double group_mean = 0.0;
    double group_square = 0.0;
    for (int64_t c = begin; c < end; c++) {
      group_mean += sums[c];
      group_square += square_sums[c];
    }
    group_mean /= numbers;
    const double variance = std::max(std::fma(-group_mean, group_mean, group_square / numbers), 0.0);  // NaN stays
    const double inverse = 1.0 / std::sqrt(variance + eps);
    std::fill(mean + begin, mean + end, static_cast<float>(group_mean));
    std::fill(inverse_deviation + begin, inverse_deviation + end, static_cast<float>(inverse));
  }
}

// Computes one sample, (S, C): y = f(scale x + shift), scale = weight / deviation, shift = scale (added - mean) + bias;
// f is SiLU, z sigmoid(z), or the identity. All but x and y: (C).
template <bool kSilu>
void normalize_sample(
    const GroupNormSizes& sizes,
    const BFloat16* x,
    const float* added,
    const float* weight,
    const float* bias,
    const float* mean,
    const float* inverse_deviation,
    BFloat16* y) {
  const int64_t channels = sizes.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(weight + c), _mm512_loadu_ps(inverse_deviation + c));
    const __m512 centre = _mm512_sub_ps(_mm512_loadu_ps(added + c), _mm512_loadu_ps(mean + c));
    const __m512 shift = _mm512_fmadd_ps(centre, scale, _mm512_loadu_ps(bias + c));
    for (int64_t s = 0; s < sizes.pixels; s++) {
      __m512 z = _mm512_fmadd_ps(load_bf16(x + s * channels + c), scale, shift);
      if constexpr (kSilu) {
        z = _mm512_mul_ps(z, sigmoid(z));
      }
      store_bf16(y + s * channels + c, z);
    }
  }
}

// Computes y = f(GroupNorm(x + added) weight + bias), f SiLU or the identity. x: (B, C, H, W) bf16, C a multiple of 16;
// added: (B, C), any dtype, or none. Returns y as x, channels last, and statistics (B, 2, C) fp32: each channel's mean
// and 1 / deviation. Source: Wu & He 2018, arXiv:1803.08494, section 3.
std::tuple<at::Tensor, at::Tensor> group_norm_forward(
    const at::Tensor& x,
    const std::optional<at::Tensor>& added,
    const at::Tensor& weight,
    const at::Tensor& bias,
    int64_t groups,
    double eps,
    bool silu) {
  const GroupNormSizes sizes = measure_group_norm(x, added, weight, bias, groups);
  const int64_t channels = sizes.channels;
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor shift = added_as_floats(added, sizes);
  const at::Tensor weight_floats = as_floats(weight);
  const at::Tensor bias_floats = as_floats(bias);
  const at::Tensor y = at::empty_like(input);
  const at::Tensor statistics = at::empty({sizes.batch, 2, channels}, shift.options());
  const BFloat16* x_data = input.const_data_ptr<BFloat16>();
  const float* shift_data = shift.const_data_ptr<float>();
  const float* weight_data = weight_floats.const_data_ptr<float>();
  const float* bias_data = bias_floats.const_data_ptr<float>();
  BFloat16* y_data = y.mutable_data_ptr<BFloat16>();
  float* statistics_data = statistics.mutable_data_ptr<float>();
  const auto normalize = silu ? normalize_sample<true> : normalize_sample<false>;
  at::parallel_for(0, sizes.batch, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> sums = make_buffer<float>(channels);
    const Buffer<float> square_sums = make_buffer<float>(channels);
    for (int64_t b = begin; b < end; b++) {
      const BFloat16* sample = x_data + b * sizes.pixels * channels;
      const float* sample_shift = shift_data + b * channels;
      float* mean = statistics_data + b * 2 * channels;
      float* inverse_deviation = mean + channels;
      group_statistics(
          sizes, sample, sample_shift, eps, sums.get(), square_sums.get(), mean, inverse_deviation);
      normalize(
          sizes,
          sample,
          sample_shift,
          weight_data,
          bias_data,
          mean,
          inverse_deviation,
          y_data + b * sizes.pixels * channels);
    }
  });
  return {y, statistics};
}

// One sample's tensors in GroupNorm's backward pass: x, gradient and d_x (S, C); the others (C).
struct GroupNormSample {
  const BFloat16* x;
  const BFloat16* gradient;
  const float* added;
  const float* weight;
  const float* bias;
  const float* mean;
  const float* inverse_deviation;
  BFloat16* d_x;
  float* d_added;
  float* d_weight;
  float* d_bias;
};

// Computes one sample's dz, the gradient before SiLU, and what follows from it per channel: d_bias = sum of dz and
// d_weight = sum of dz h, with h = (x + added - mean) / deviation and z = weight h + bias.
// Formula: SiLU'(z) = s (1 + z (1 - s)), s = sigmoid(z). dz: [C / 16][S][16], so that it is written in one go.
template <bool kSilu>
void differentiate_channels(const GroupNormSizes& sizes, const GroupNormSample& sample, float* dz) {
  const int64_t channels = sizes.channels;
  const __m512 one = broadcast(1.0f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __m512 scale = _mm512_loadu_ps(sample.inverse_deviation + c);
    const __m512 centre = _mm512_sub_ps(_mm512_loadu_ps(sample.added + c), _mm512_loadu_ps(sample.mean + c));
    const __m512 shift = _mm512_mul_ps(centre, scale);
    const __m512 weight = _mm512_loadu_ps(sample.weight + c);
    const __m512 bias = _mm512_loadu_ps(sample.bias + c);
    float* dz_column = dz + c * sizes.pixels;
    __m512 sum = _mm512_setzero_ps();
    __m512 weighted_sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < sizes.pixels; s++) {
      const __m512 h = _mm512_fmadd_ps(load_bf16(sample.x + s * channels + c), scale, shift);
      __m512 gradient = load_bf16(sample.gradient + s * channels + c);
      if constexpr (kSilu) {
        const __m512 z = _mm512_fmadd_ps(h, weight, bias);
        const __m512 gate = sigmoid(z);
        const __m512 slope = _mm512_mul_ps(gate, _mm512_fmadd_ps(z, _mm512_sub_ps(one, gate), one));
        gradient = _mm512_mul_ps(gradient, slope);
      }
      _mm512_storeu_ps(dz_column + s * kLanes, gradient);
      sum = _mm512_add_ps(sum, gradient);
      weighted_sum = _mm512_fmadd_ps(gradient, h, weighted_sum);
    }
    _mm512_storeu_ps(sample.d_bias + c, sum);
    _mm512_storeu_ps(sample.d_weight + c, weighted_sum);
  }
}

// Computes what each group's mean and deviation pass on, written once per channel of the group: the means over the
// group of weight dz and of weight dz h. dz_means, dz_h_means: (C).
void differentiate_groups(
    const GroupNormSizes& sizes, const GroupNormSample& sample, float* dz_means, float* dz_h_means) {
  const int64_t group_channels = sizes.channels / sizes.groups;
  const double numbers = sizes.group_numbers();
  for (int64_t begin = 0; begin < sizes.channels; begin += group_channels) {
    const int64_t end = begin + group_channels;
    double dz_sum = 0.0;
    double dz_h_sum = 0.0;
    for (int64_t c = begin; c < end; c++) {
      const double weight = sample.weight[c];
      dz_sum += weight * sample.d_bias[c];
      dz_h_sum += weight * sample.d_weight[c];
    }
    std::fill(dz_means + begin, dz_means + end, static_cast<float>(dz_sum / numbers));
    std::fill(dz_h_means + begin, dz_h_means + end, static_cast<float>(dz_h_sum / numbers));
  }
}

// Computes one sample's dx = (weight dz - mean(weight dz) - h mean(weight dz h)) / deviation, the means over the group,
// and d_added, its sum over the pixels. dz: [C / 16][S][16]; dz_means, dz_h_means: (C).
// Source: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3 (the same derivative, over a batch instead of a group).
void differentiate_input(
    const GroupNormSizes& sizes,
    const GroupNormSample& sample,
    const float* dz,
    const float* dz_means,
    const float* dz_h_means) {
  const int64_t channels = sizes.channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __m512 scale = _mm512_loadu_ps(sample.inverse_deviation + c);
    const __m512 centre = _mm512_sub_ps(_mm512_loadu_ps(sample.added + c), _mm512_loadu_ps(sample.mean + c));
    const __m512 shift = _mm512_mul_ps(centre, scale);
    const __m512 weight = _mm512_loadu_ps(sample.weight + c);
    const __m512 dz_mean = _mm512_loadu_ps(dz_means + c);
    const __m512 dz_h_mean = _mm512_loadu_ps(dz_h_means + c);
    const float* dz_column = dz + c * sizes.pixels;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < sizes.pixels; s++) {
      const __m512 h = _mm512_fmadd_ps(load_bf16(sample.x + s * channels + c), scale, shift);
      const __m512 centred = _mm512_fmsub_ps(weight, _mm512_loadu_ps(dz_column + s * kLanes), dz_mean);
      const __m512 d_x = _mm512_mul_ps(scale, _mm512_fnmadd_ps(h, dz_h_mean, centred));
      sum = _mm512_add_ps(sum, d_x);
      store_bf16(sample.d_x + s * channels + c, d_x);
    }
    _mm512_storeu_ps(sample.d_added + c, sum);
  }
}

// Computes the gradients of group_norm_forward. gradient: as y, converted to bf16; statistics (B, 2, C) as returned by
// the forward pass. Returns dx (B, C, H, W) bf16, channels last; d_added (B, C) in added's dtype, undefined (None) if
// there is no added; d_weight and d_bias (C) in their dtypes. Formulas: the three functions above.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor& gradient,
    const at::Tensor& x,
    const std::optional<at::Tensor>& added,
    const at::Tensor& weight,
    const at::Tensor& bias,
    const at::Tensor& statistics,
    int64_t groups,
    bool silu) {
  const GroupNormSizes sizes = measure_group_norm(x, added, weight, bias, groups);
  const int64_t channels = sizes.channels;
  const int64_t pixels = sizes.pixels;
  check_gradient(gradient, x.sizes());
  check_statistics(statistics, {sizes.batch, 2, channels});
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor d_y = gradient.to(at::kBFloat16).contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor shift = added_as_floats(added, sizes);
  const at::Tensor weight_floats = as_floats(weight);
  const at::Tensor bias_floats = as_floats(bias);
  const at::Tensor d_x = at::empty_like(input);
  const at::Tensor d_added = at::empty_like(shift);
  const at::Tensor d_weight = at::empty_like(shift);
  const at::Tensor d_bias = at::empty_like(shift);
  const GroupNormSample whole{
      input.const_data_ptr<BFloat16>(),
      d_y.const_data_ptr<BFloat16>(),
      shift.const_data_ptr<float>(),
      weight_floats.const_data_ptr<float>(),
      bias_floats.const_data_ptr<float>(),
      statistics.const_data_ptr<float>(),
      statistics.const_data_ptr<float>() + channels,
      d_x.mutable_data_ptr<BFloat16>(),
      d_added.mutable_data_ptr<float>(),
      d_weight.mutable_data_ptr<float>(),
      d_bias.mutable_data_ptr<float>()};
  const auto differentiate = silu ? differentiate_channels<true> : differentiate_channels<false>;
  at::parallel_for(0, sizes.batch, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> dz = make_buffer<float>(pixels * channels);
    const Buffer<float> dz_means = make_buffer<float>(channels);
    const Buffer<float> dz_h_means = make_buffer<float>(channels);
    for (int64_t b = begin; b < end; b++) {
      const GroupNormSample sample{
          whole.x + b * pixels * channels,
          whole.gradient + b * pixels * channels,
          whole.added + b * channels,
          whole.weight,
          whole.bias,
          whole.mean + b * 2 * channels,
          whole.inverse_deviation + b * 2 * channels,
          whole.d_x + b * pixels * channels,
          whole.d_added + b * channels,
          whole.d_weight + b * channels,
          whole.d_bias + b * channels};
      differentiate(sizes, sample, dz.get());
      differentiate_groups(sizes, sample, dz_means.get(), dz_h_means.get());
      differentiate_input(sizes, sample, dz.get(), dz_means.get(), dz_h_means.get());
    }
  });
  return {
      d_x,
      added.has_value() ? d_added.to(added->scalar_type()) : at::Tensor(),
      d_weight.sum(0).to(weight.scalar_type()),
      d_bias.sum(0).to(bias.scalar_type())};
}

// ---- LayerNorm ----

// Checks dtypes and shapes of x (..., C) and weight (C), and returns C.
int64_t measure_layer_norm(const at::Tensor& x, const at::Tensor& weight) {
  check_bf16(x, "x");
  TORCH_CHECK(x.dim() > 0, "x must have at least one axis");
  const int64_t channels = x.size(-1);
  TORCH_CHECK(
      channels > 0 && channels % kLanes == 0, "channels must be a multiple of ", kLanes, ", and are ", channels);
  check_parameter(weight, channels, "weight");
  return channels;
}

// Computes y = weight (x - mean) / deviation + bias over the last axis. x: (..., C) bf16, C a multiple of 16;
// weight and bias: (C), any dtype. Returns y as x, and statistics (rows, 2) fp32: each row's mean and 1 / deviation.
// Source: Ba et al. 2016, arXiv:1607.06450, equation 3; eps is added to the variance.
std::tuple<at::Tensor, at::Tensor> layer_norm_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const int64_t channels = measure_layer_norm(x, weight);
  check_parameter(bias, channels, "bias");
  const int64_t rows = x.numel() / channels;
  const at::Tensor input = x.contiguous();
  const at::Tensor weight_floats = as_floats(weight);
  const at::Tensor bias_floats = as_floats(bias);
  const at::Tensor y = at::empty_like(input);
  const at::Tensor statistics = at::empty({rows, 2}, weight_floats.options());
  const BFloat16* x_data = input.const_data_ptr<BFloat16>();
  const float* weight_data = weight_floats.const_data_ptr<float>();
  const float* bias_data = bias_floats.const_data_ptr<float>();
  BFloat16* y_data = y.mutable_data_ptr<BFloat16>();
  float* statistics_data = statistics.mutable_data_ptr<float>();
  const float divisor = static_cast<float>(channels);
  at::parallel_for(0, rows, kRowsPerSum, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const BFloat16* row = x_data + i * channels;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < channels; c += kLanes) {
        sum = _mm512_add_ps(sum, load_bf16(row + c));
      }
      const float mean = _mm512_reduce_add_ps(sum) / divisor;
      __m512 square_sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < channels; c += kLanes) {
        const __m512 centred = _mm512_sub_ps(load_bf16(row + c), broadcast(mean));
        square_sum = _mm512_fmadd_ps(centred, centred, square_sum);
      }
      const float variance = _mm512_reduce_add_ps(square_sum) / divisor;
      const float inverse_deviation = 1.0f / std::sqrt(variance + static_cast<float>(eps));
      statistics_data[2 * i] = mean;
      statistics_data[2 * i + 1] = inverse_deviation;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const __m512 centred = _mm512_sub_ps(load_bf16(row + c), broadcast(mean));
        const __m512 h = _mm512_mul_ps(centred, broadcast(inverse_deviation));
        const __m512 z = _mm512_fmadd_ps(h, _mm512_loadu_ps(weight_data + c), _mm512_loadu_ps(bias_data + c));
        store_bf16(y_data + i * channels + c, z);
      }
    }
  });
  return {y, statistics};
}

// Computes one row's dx (C), and adds its share to d_weight and d_bias (C).
// Formula: dx = (weight dy - mean(weight dy) - h mean(weight dy h)) / deviation, the means over the row;
// d_weight = sum of dy h, d_bias = sum of dy; h = (x - mean) / deviation.
void differentiate_row(
    int64_t channels,
    const BFloat16* x,
    const BFloat16* gradient,
    const float* weight,
    float mean,
    float inverse_deviation,
    BFloat16* d_x,
    float* d_weight,
    float* d_bias) {
  const float divisor = static_cast<float>(channels);
  const __m512 scale = broadcast(inverse_deviation);
  const __m512 shift = broadcast(-mean * inverse_deviation);
  __m512 sum = _mm512_setzero_ps();
  __m512 sum_h = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __m512 h = _mm512_fmadd_ps(load_bf16(x + c), scale, shift);
    const __m512 dy = load_bf16(gradient + c);
    const __m512 weighted = _mm512_mul_ps(dy, _mm512_loadu_ps(weight + c));
    sum = _mm512_add_ps(sum, weighted);
    sum_h = _mm512_fmadd_ps(weighted, h, sum_h);
    _mm512_storeu_ps(d_weight + c, _mm512_fmadd_ps(dy, h, _mm512_loadu_ps(d_weight + c)));
    _mm512_storeu_ps(d_bias + c, _mm512_add_ps(dy, _mm512_loadu_ps(d_bias + c)));
  }
  const __m512 mean_dy = broadcast(_mm512_reduce_add_ps(sum) / divisor);
  const __m512 mean_dy_h = broadcast(_mm512_reduce_add_ps(sum_h) / divisor);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const __m512 h = _mm512_fmadd_ps(load_bf16(x + c), scale, shift);
    const __m512 centred = _mm512_fmsub_ps(load_bf16(gradient + c), _mm512_loadu_ps(weight + c), mean_dy);
    store_bf16(d_x + c, _mm512_mul_ps(scale, _mm512_fnmadd_ps(h, mean_dy_h, centred)));
  }
}

// Computes the gradients of layer_norm_forward. gradient: as y, converted to bf16; statistics (rows, 2) as returned by
// the forward pass. Returns dx as x, d_weight and d_bias (C) in weight's dtype. Formulas: differentiate_row.
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& statistics) {
  const int64_t channels = measure_layer_norm(x, weight);
  const int64_t rows = x.numel() / channels;
  check_gradient(gradient, x.sizes());
  check_statistics(statistics, {rows, 2});
  const int64_t chunks = (rows + kRowsPerSum - 1) / kRowsPerSum;
  const at::Tensor input = x.contiguous();
  const at::Tensor d_y = gradient.to(at::kBFloat16).contiguous();
  const at::Tensor weight_floats = as_floats(weight);
  const at::Tensor d_x = at::empty_like(input);
  const at::Tensor d_parameters = at::zeros({chunks, 2, channels}, statistics.options());
  const BFloat16* x_data = input.const_data_ptr<BFloat16>();
  const BFloat16* gradient_data = d_y.const_data_ptr<BFloat16>();
  const float* weight_data = weight_floats.const_data_ptr<float>();
  const float* statistics_data = statistics.const_data_ptr<float>();
  BFloat16* d_x_data = d_x.mutable_data_ptr<BFloat16>();
  float* d_parameters_data = d_parameters.mutable_data_ptr<float>();
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* d_weight = d_parameters_data + chunk * 2 * channels;
      float* d_bias = d_weight + channels;
      const int64_t last = std::min(rows, (chunk + 1) * kRowsPerSum);
      for (int64_t i = chunk * kRowsPerSum; i < last; i++) {
        differentiate_row(
            channels,
            x_data + i * channels,
            gradient_data + i * channels,
            weight_data,
            statistics_data[2 * i],
            statistics_data[2 * i + 1],
            d_x_data + i * channels,
            d_weight,
            d_bias);
      }
    }
  });
  const at::Tensor sums = d_parameters.sum(0);
  return {d_x, sums[0].to(weight.scalar_type()), sums[1].to(weight.scalar_type())};
}

// ---- GEGLU ----

// Checks dtype and shape of hidden (..., 2 F), and returns F.
int64_t measure_geglu(const at::Tensor& hidden) {
  check_bf16(hidden, "hidden");
  TORCH_CHECK(
      hidden.dim() > 0 && hidden.size(-1) > 0 && hidden.size(-1) % (2 * kLanes) == 0,
      "the last axis of hidden must be a multiple of ", 2 * kLanes, ": two halves, each of whole registers; hidden is ",
      hidden.sizes());
  return hidden.size(-1) / 2;
}

// Returns hidden's shape with its last axis halved.
std::vector<int64_t> halved(const at::Tensor& hidden) {
  std::vector<int64_t> sizes = hidden.sizes().vec();
  sizes.back() /= 2;
  return sizes;
}

// Computes y = a GELU(z), where hidden = (a, z) along the last axis and GELU(z) = z cdf(z), exact, not the tanh one.
// hidden: (..., 2 F) bf16, F a multiple of 16. Returns y (..., F) bf16.
// Source: Shazeer 2020, arXiv:2002.05202, section 2 (GEGLU); Hendrycks & Gimpel 2016, arXiv:1606.08415 (GELU).
at::Tensor geglu_forward(const at::Tensor& hidden) {
  const int64_t width = measure_geglu(hidden);
  const int64_t rows = hidden.numel() / (2 * width);
  const at::Tensor input = hidden.contiguous();
  const at::Tensor y = at::empty(halved(hidden), input.options());
  const BFloat16* hidden_data = input.const_data_ptr<BFloat16>();
  BFloat16* y_data = y.mutable_data_ptr<BFloat16>();
  at::parallel_for(0, rows, kGegluGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const BFloat16* a_row = hidden_data + i * 2 * width;
      const BFloat16* z_row = a_row + width;
      for (int64_t f = 0; f < width; f += kLanes) {
        const __m512 a = load_bf16(a_row + f);
        const __m512 z = load_bf16(z_row + f);
        const __m512 gelu = _mm512_mul_ps(z, normal_distribution(z).cdf);
        store_bf16(y_data + i * width + f, _mm512_mul_ps(a, gelu));
      }
    }
  });
  return y;
}

// Computes the gradient of geglu_forward: da = dy z cdf(z), dz = dy a (cdf(z) + z pdf(z)). gradient: (..., F),
// converted to bf16; hidden: (..., 2 F) bf16. Returns (da, dz) along the last axis, as hidden.
at::Tensor geglu_backward(const at::Tensor& gradient, const at::Tensor& hidden) {
  const int64_t width = measure_geglu(hidden);
  const int64_t rows = hidden.numel() / (2 * width);
  check_gradient(gradient, halved(hidden));
  const at::Tensor input = hidden.contiguous();
  const at::Tensor d_y = gradient.to(at::kBFloat16).contiguous();
  const at::Tensor d_hidden = at::empty_like(input);
  const BFloat16* hidden_data = input.const_data_ptr<BFloat16>();
  const BFloat16* gradient_data = d_y.const_data_ptr<BFloat16>();
  BFloat16* d_hidden_data = d_hidden.mutable_data_ptr<BFloat16>();
  at::parallel_for(0, rows, kGegluGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const BFloat16* a_row = hidden_data + i * 2 * width;
      const BFloat16* z_row = a_row + width;
      BFloat16* da_row = d_hidden_data + i * 2 * width;
      BFloat16* dz_row = da_row + width;
      for (int64_t f = 0; f < width; f += kLanes) {
        const __m512 a = load_bf16(a_row + f);
        const __m512 z = load_bf16(z_row + f);
        const __m512 dy = load_bf16(gradient_data + i * width + f);
        const Normal normal = normal_distribution(z);
        const __m512 slope = _mm512_fmadd_ps(z, normal.pdf, normal.cdf);
        store_bf16(da_row + f, _mm512_mul_ps(dy, _mm512_mul_ps(z, normal.cdf)));
        store_bf16(dz_row + f, _mm512_mul_ps(_mm512_mul_ps(dy, a), slope));
      }
    }
  });
  return d_hidden;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nano, library) {
  library.def(
      "group_norm_forward(Tensor x, Tensor? added, Tensor weight, Tensor bias, int groups, float eps, bool silu) "
      "-> (Tensor, Tensor)");
  library.def(
      "group_norm_backward(Tensor gradient, Tensor x, Tensor? added, Tensor weight, Tensor bias, Tensor statistics, "
      "int groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)");
  library.def(
      "layer_norm_backward(Tensor gradient, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor, Tensor)");
  library.def("geglu_forward(Tensor hidden) -> Tensor");
  library.def("geglu_backward(Tensor gradient, Tensor hidden) -> Tensor");
}

TORCH_LIBRARY_IMPL(nano, CPU, library) {
  library.impl("group_norm_forward", &group_norm_forward);
  library.impl("group_norm_backward", &group_norm_backward);
  library.impl("layer_norm_forward", &layer_norm_forward);
  library.impl("layer_norm_backward", &layer_norm_backward);
  library.impl("geglu_forward", &geglu_forward);
  library.impl("geglu_backward", &geglu_backward);
}

}  // namespace nano
