// What the kernels share: bf16 in and out of AVX-512 registers, a few functions of sixteen numbers, a small product.
//
// Everything is computed in fp32 and kept in bf16. Nothing depends on the compiler's freedom to fuse a multiplication
// with an addition: build with -ffp-contract=off; where one rounding is meant, the code says fmadd.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include <c10/util/BFloat16.h>

namespace nano {

using c10::BFloat16;

// fp32 numbers in a register.
constexpr int64_t kLanes = 16;

// Returns the smallest multiple of `step` that is not below `count`.
inline int64_t round_up(int64_t count, int64_t step) {
  return (count + step - 1) / step * step;
}

// Gives back what std::aligned_alloc gave.
struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};

// Working memory that begins at a cache line, so that no register is loaded from two lines.
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Returns memory for `count` numbers, not yet set to anything.
template <typename T>
Buffer<T> make_buffer(int64_t count) {
  constexpr int64_t kCacheLine = 64;
  const int64_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), kCacheLine);
  T* memory = static_cast<T*>(std::aligned_alloc(kCacheLine, bytes));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return Buffer<T>(memory);
}

// Returns a mask of the first `count` lanes: none if count <= 0, all sixteen if count >= 16.
inline __mmask16 first_lanes(int64_t count) {
  const int64_t lanes = std::clamp<int64_t>(count, 0, kLanes);
  return static_cast<__mmask16>((1u << lanes) - 1);
}

// Returns sixteen copies of a number.
inline __m512 broadcast(float x) {
  return _mm512_set1_ps(x);
}

// Returns sixteen bf16 as fp32, exactly: a bf16 is the upper half of an fp32.
inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Returns sixteen fp32 as bf16, rounded to nearest even; subnormals become zero.
inline __m256i narrow(__m512 x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}

// Loads sixteen bf16 from any address.
inline __m512 load_bf16(const BFloat16* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Loads the bf16 under the mask; the other lanes are zero, and their memory is not touched.
inline __m512 load_bf16(const BFloat16* from, __mmask16 mask) {
  return widen(_mm256_maskz_loadu_epi16(mask, from));
}

// Stores sixteen numbers as bf16 to any address.
inline void store_bf16(BFloat16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x));
}

// Stores the numbers under the mask as bf16; other memory is not touched.
inline void store_bf16(BFloat16* to, __m512 x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, narrow(x));
}

// Returns e^x for x <= 88; below -87, and for NaN, it returns e^-87. Relative error below 4e-6, a thousandth of bf16's.
// Formula: e^x = 2^n 2^f with n + f = x / ln 2, n whole, |f| <= 1/2; 2^f = e^(f ln 2) by its series up to f^5.
// Source: Abramowitz & Stegun, 4.2.1 (the series).
inline __m512 vexp(__m512 x) {
  const __m512 power = _mm512_mul_ps(_mm512_max_ps(x, broadcast(-87.0f)), broadcast(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(power, 0);
  const __m512 fraction = _mm512_sub_ps(power, whole);
  __m512 series = broadcast(1.33335581e-3f);
  series = _mm512_fmadd_ps(series, fraction, broadcast(9.61812911e-3f));
  series = _mm512_fmadd_ps(series, fraction, broadcast(5.55041087e-2f));
  series = _mm512_fmadd_ps(series, fraction, broadcast(2.40226507e-1f));
  series = _mm512_fmadd_ps(series, fraction, broadcast(6.93147181e-1f));
  series = _mm512_fmadd_ps(series, fraction, broadcast(1.0f));
  return _mm512_scalef_ps(series, whole);
}

// Returns 1 / (1 + e^-x), for any x; below -87 it returns the value at -87, so that x * sigmoid(x) stays finite.
inline __m512 sigmoid(__m512 x) {
  const __m512 negative = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), broadcast(87.0f));
  return _mm512_div_ps(broadcast(1.0f), _mm512_add_ps(broadcast(1.0f), vexp(negative)));
}

// The standard normal distribution at sixteen points.
struct Normal {
  __m512 cdf;
  __m512 pdf;
};

// Returns the standard normal distribution function and density at z, which share e^(-z^2 / 2).
// Formula: pdf = e^(-z^2 / 2) / sqrt(2 pi); cdf = 1 - erfc(|z| / sqrt 2) / 2, mirrored where z < 0.
// Source: Abramowitz & Stegun, 7.1.26 (erf, absolute error below 1.5e-7).
inline Normal normal_distribution(__m512 z) {
  const __m512 bell = vexp(_mm512_mul_ps(_mm512_mul_ps(z, z), broadcast(-0.5f)));
  const __m512 argument = _mm512_mul_ps(_mm512_abs_ps(z), broadcast(0.70710678f));
  const __m512 t = _mm512_div_ps(broadcast(1.0f), _mm512_fmadd_ps(argument, broadcast(0.3275911f), broadcast(1.0f)));
  __m512 series = broadcast(1.061405429f);
  series = _mm512_fmadd_ps(series, t, broadcast(-1.453152027f));
  series = _mm512_fmadd_ps(series, t, broadcast(1.421413741f));
  series = _mm512_fmadd_ps(series, t, broadcast(-0.284496736f));
  series = _mm512_fmadd_ps(series, t, broadcast(0.254829592f));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(series, t), bell), broadcast(0.5f));
  const __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 cdf = _mm512_mask_blend_ps(negative, _mm512_sub_ps(broadcast(1.0f), tail), tail);
  return {cdf, _mm512_mul_ps(bell, broadcast(0.39894228f))};
}

// ---- Products of bf16 matrices ----
//
// vdpbf16ps multiplies pairs of bf16 and adds both products to an fp32. So matrices are kept in pairs along the axis
// that is summed over, and the right-hand one as a *panel*: [pairs][columns][2], columns a multiple of sixteen.

// Returns two bf16 that lie next to each other as one number.
inline uint32_t load_pair(const BFloat16* from) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof(pair));
  return pair;
}

// Stores what load_pair returned.
inline void store_pair(BFloat16* to, uint32_t pair) {
  std::memcpy(to, &pair, sizeof(pair));
}

// Returns sixteen pairs from two times sixteen bf16: first[0], second[0], first[1], second[1], ...
inline __m512i interleave(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// The left-hand matrix, bf16, with pairs along its columns: pair k of row r lies at data + r * row + k * pair.
struct PairedRows {
  const BFloat16* data;
  int64_t row;
  int64_t pair;
};

// Computes kRows x (16 kVectors) of the product: out[r][j] = sum over k and i in {0, 1} of left[r][k][i] *
// panel[k][j][i]. `panel` and `out` (fp32) point at the first of these columns and have `columns` columns in all.
// The loops must be unrolled early, or GCC keeps a copy of the sums in memory; and the function must stay on its own,
// or its callers want the registers too.
template <int kRows, int kVectors>
[[gnu::noinline]] void multiply_block(
    PairedRows left, const BFloat16* panel, int64_t columns, int64_t pairs, float* out) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      sums[r][j] = _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < pairs; k++) {
    __m512i right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      right[j] = _mm512_loadu_si512(panel + 2 * (k * columns + kLanes * j));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const uint32_t pair = load_pair(left.data + r * left.row + k * left.pair);
      const __m512i copies = _mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        sums[r][j] = _mm512_dpbf16_ps(
            sums[r][j], reinterpret_cast<__m512bh>(copies), reinterpret_cast<__m512bh>(right[j]));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      _mm512_storeu_ps(out + r * columns + kLanes * j, sums[r][j]);
    }
  }
}

// Multiplies kRows rows (bf16 pairs) with a panel [pairs][columns][2] into out [kRows][columns], fp32. Four rows and
// four registers of columns at a time keep sixteen sums in registers.
template <int kRows>
inline void multiply(PairedRows left, const BFloat16* panel, int64_t columns, int64_t pairs, float* out) {
  int64_t vectors = columns / kLanes;
  for (; vectors >= 4; vectors -= 4) {
    multiply_block<kRows, 4>(left, panel, columns, pairs, out);
    panel += 2 * 4 * kLanes;
    out += 4 * kLanes;
  }
  if (vectors == 3) {
    multiply_block<kRows, 3>(left, panel, columns, pairs, out);
  } else if (vectors == 2) {
    multiply_block<kRows, 2>(left, panel, columns, pairs, out);
  } else if (vectors == 1) {
    multiply_block<kRows, 1>(left, panel, columns, pairs, out);
  }
}

}  // namespace nano
