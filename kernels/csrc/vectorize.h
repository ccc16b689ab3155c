// What plain loops need to become vector loops, and tensors to become pointers.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <type_traits>

// One copy of a function for each level of x86-64, chosen when the library is loaded. Elsewhere the
// compiler's baseline (NEON on arm64) is what there is.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define SAFER_FAST_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SAFER_FAST_CLONES
#endif

// For loop bodies shared by several clones: the body has to be compiled anew inside each of them.
#define SAFER_FAST_INLINE inline __attribute__((always_inline))

namespace safer_fast {

// Elements that one thread takes at a time, small enough to stay in its cache.
constexpr int64_t kGrain = 32768;
// Elements behind one partial sum. Fixed, so that no sum depends on the number of threads.
constexpr int64_t kChunk = 16384;
// Running sums side by side in one chunk: the order of addition is that of this number, on any CPU.
constexpr int64_t kLanes = 16;

// Both leave a NaN value as it is, as torch.clamp does and std::max does not. One choice each: gcc
// makes vectors of that and branches of more.
SAFER_FAST_INLINE float at_least(float value, float bound) { return bound > value ? bound : value; }
SAFER_FAST_INLINE float at_most(float value, float bound) { return bound < value ? bound : value; }

// Calls f with a pointer to the data of a tensor in single or half precision.
template <typename F>
void with_data(const at::Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return f(tensor.const_data_ptr<float>());
    case at::kBFloat16:
      return f(tensor.const_data_ptr<at::BFloat16>());
    case at::kHalf:
      return f(tensor.const_data_ptr<at::Half>());
    default:
      TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// The same for data that f writes.
template <typename F>
void with_mutable_data(const at::Tensor& tensor, const F& f) {
  with_data(tensor, [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    f(tensor.mutable_data_ptr<T>());
  });
}

// The value of a 0-d fp32 tensor.
inline float scalar_value(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.numel() == 1, "expected a scalar, got shape ", tensor.sizes());
  return *tensor.const_data_ptr<float>();
}

// Reading other from start to end in step with first stays inside its memory and pairs like with
// like. Strides may differ where a dimension has one element: no step is made along it.
inline void check_same_memory(const at::Tensor& first, const at::Tensor& other) {
  const auto both = [&](at::MemoryFormat order) {
    return first.is_contiguous(order) && other.is_contiguous(order);
  };
  TORCH_CHECK(first.sizes() == other.sizes() &&
                  (both(at::MemoryFormat::Contiguous) || both(at::MemoryFormat::ChannelsLast)),
              "expected tensors of one shape in one dense memory order, got ", first.sizes(),
              " with strides ", first.strides(), " and ", other.sizes(), " with strides ",
              other.strides());
}

}  // namespace safer_fast
