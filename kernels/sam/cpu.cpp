// Norm, perturbation and restore on the CPU. Formulas: __init__.py; the plain version:
// reference.py.

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "../csrc/ops.h"
#include "../csrc/vectorize.h"

namespace safer_fast {
namespace {

template <bool weighted, typename T>
SAFER_FAST_INLINE double sum_squares_body(const T* x, const float* weight, int64_t n) {
  const auto value_at = [&](int64_t i) __attribute__((always_inline)) {
    const double value = static_cast<float>(x[i]);
    return weighted ? value * weight[i] : value;
  };
  double sums[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = value_at(i + lane);
      sums[lane] += value * value;
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    const double value = value_at(i);
    sums[i - whole] += value * value;
  }
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
  }
  return sum;
}

template <bool adaptive, typename C, typename T>
SAFER_FAST_INLINE void perturb_body(C* compute, const float* master, const T* gradient, float scale,
                                    int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float weight = master[i];
    const float factor = adaptive ? scale * (weight * weight) : scale;
    compute[i] = static_cast<C>(weight + factor * static_cast<float>(gradient[i]));
  }
}

template <typename C>
SAFER_FAST_INLINE void restore_body(C* compute, const float* master, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    compute[i] = static_cast<C>(master[i]);
  }
}

// target_clones does not apply to templates: one free function for each combination of dtypes.
#define SAFER_FAST_SUM_LOOP(T)                                                       \
  SAFER_FAST_CLONES double sum_squares_loop(const T* x, const float* w, int64_t n) { \
    return w ? sum_squares_body<true>(x, w, n) : sum_squares_body<false>(x, w, n);   \
  }
#define SAFER_FAST_PERTURB_LOOP(C, T)                                                     \
  SAFER_FAST_CLONES void perturb_loop(C* compute, const float* master, const T* gradient, \
                                      float scale, bool adaptive, int64_t n) {            \
    if (adaptive) {                                                                       \
      perturb_body<true>(compute, master, gradient, scale, n);                            \
    } else {                                                                              \
      perturb_body<false>(compute, master, gradient, scale, n);                           \
    }                                                                                     \
  }
#define SAFER_FAST_RESTORE_LOOP(C)                                                  \
  SAFER_FAST_CLONES void restore_loop(C* compute, const float* master, int64_t n) { \
    restore_body(compute, master, n);                                               \
  }

SAFER_FAST_SUM_LOOP(float)
SAFER_FAST_SUM_LOOP(at::BFloat16)
SAFER_FAST_SUM_LOOP(at::Half)
SAFER_FAST_PERTURB_LOOP(float, float)
SAFER_FAST_PERTURB_LOOP(float, at::BFloat16)
SAFER_FAST_PERTURB_LOOP(float, at::Half)
SAFER_FAST_PERTURB_LOOP(at::BFloat16, float)
SAFER_FAST_PERTURB_LOOP(at::BFloat16, at::BFloat16)
SAFER_FAST_PERTURB_LOOP(at::BFloat16, at::Half)
SAFER_FAST_PERTURB_LOOP(at::Half, float)
SAFER_FAST_PERTURB_LOOP(at::Half, at::BFloat16)
SAFER_FAST_PERTURB_LOOP(at::Half, at::Half)
SAFER_FAST_RESTORE_LOOP(float)
SAFER_FAST_RESTORE_LOOP(at::BFloat16)
SAFER_FAST_RESTORE_LOOP(at::Half)

}  // namespace

// One pass: 4 bytes per element in fp32, 8 with a weight.
at::Tensor sum_squares(const at::Tensor& x, const std::optional<at::Tensor>& weight) {
  check_same_memory(x, weight.value_or(x));
  const float* factor = weight ? weight->const_data_ptr<float>() : nullptr;
  const int64_t n = x.numel();
  std::vector<double> partials(at::divup(n, kChunk));
  with_data(x, [&](auto* values) {
    at::parallel_for(0, static_cast<int64_t>(partials.size()), 2, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t start = chunk * kChunk;
        partials[chunk] = sum_squares_loop(values + start, factor ? factor + start : nullptr,
                                           std::min(kChunk, n - start));
      }
    });
  });
  double sum = 0;
  for (const double partial : partials) {
    sum += partial;
  }
  at::Tensor result = at::empty({}, x.options().dtype(at::kFloat));
  *result.mutable_data_ptr<float>() = static_cast<float>(sum);
  return result;
}

// One pass: reads master and gradient, writes compute; 10 bytes per element for fp32 into bf16.
void perturb_(const at::Tensor& compute, const at::Tensor& master, const at::Tensor& gradient,
              const at::Tensor& scale, bool adaptive) {
  check_same_memory(compute, master);
  check_same_memory(compute, gradient);
  const float* weights = master.const_data_ptr<float>();
  const float factor = scalar_value(scale);
  with_mutable_data(compute, [&](auto* target) {
    with_data(gradient, [&](auto* slope) {
      at::parallel_for(0, compute.numel(), kGrain, [&](int64_t begin, int64_t end) {
        perturb_loop(target + begin, weights + begin, slope + begin, factor, adaptive, end - begin);
      });
    });
  });
}

// One pass: reads master, writes compute; 6 bytes per element for fp32 into bf16.
void restore_(const at::Tensor& compute, const at::Tensor& master) {
  check_same_memory(compute, master);
  const float* weights = master.const_data_ptr<float>();
  with_mutable_data(compute, [&](auto* target) {
    at::parallel_for(0, compute.numel(), kGrain, [&](int64_t begin, int64_t end) {
      restore_loop(target + begin, weights + begin, end - begin);
    });
  });
}

}  // namespace safer_fast
