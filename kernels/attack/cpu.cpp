// The attack steps on the CPU. Formulas: __init__.py; the plain version: reference.py.

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../csrc/ops.h"
#include "../csrc/vectorize.h"

namespace safer_fast {
namespace {

// Squares over one image or a part of it: of the gradient g, of the offset d = adversarial -
// images, and d * g.
struct Sums {
  double gradient = 0;
  double offset = 0;
  double cross = 0;
};

// What an image is updated with: offset' = scale * (offset + step * gradient).
struct Move {
  double step;
  double scale;
};

template <typename T>
SAFER_FAST_INLINE void linf_step_body(float* adversarial, const float* images, const T* gradient,
                                      float step_size, float epsilon, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float slope = static_cast<float>(gradient[i]);
    const float sign = static_cast<float>((slope > 0) - (slope < 0));
    const float lower = images[i] - epsilon;
    const float upper = images[i] + epsilon;
    float moved = adversarial[i] + step_size * sign;
    // Comparisons are false for NaN: it stays in moved, but has to be brought there.
    moved = slope != slope ? slope : moved;
    moved = lower != lower ? lower : moved;
    adversarial[i] = at_most(at_least(at_most(at_least(moved, lower), upper), 0.0f), 1.0f);
  }
}

template <typename T>
SAFER_FAST_INLINE Sums l2_sums_body(const float* adversarial, const float* images,
                                    const T* gradient, int64_t n) {
  double squares[kLanes] = {}, offsets[kLanes] = {}, crosses[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double slope = static_cast<float>(gradient[i + lane]);
      const double offset = static_cast<double>(adversarial[i + lane]) - images[i + lane];
      squares[lane] += slope * slope;
      offsets[lane] += offset * offset;
      crosses[lane] += offset * slope;
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    const double slope = static_cast<float>(gradient[i]);
    const double offset = static_cast<double>(adversarial[i]) - images[i];
    squares[i - whole] += slope * slope;
    offsets[i - whole] += offset * offset;
    crosses[i - whole] += offset * slope;
  }
  Sums sums;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sums.gradient += squares[lane];
    sums.offset += offsets[lane];
    sums.cross += crosses[lane];
  }
  return sums;
}

template <typename T>
SAFER_FAST_INLINE void l2_move_body(float* adversarial, const float* images, const T* gradient,
                                    Move move, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double image = images[i];
    const double slope = static_cast<float>(gradient[i]);
    const double offset = move.scale * (adversarial[i] - image + move.step * slope);
    adversarial[i] = at_most(at_least(static_cast<float>(image + offset), 0.0f), 1.0f);
  }
}

// target_clones does not apply to templates: one free function for each dtype of the gradient.
#define SAFER_FAST_ATTACK_LOOPS(T)                                                                \
  SAFER_FAST_CLONES void linf_step_loop(float* adversarial, const float* images,                  \
                                        const T* gradient, float step_size, float epsilon,        \
                                        int64_t n) {                                              \
    linf_step_body(adversarial, images, gradient, step_size, epsilon, n);                         \
  }                                                                                               \
  SAFER_FAST_CLONES Sums l2_sums_loop(const float* adversarial, const float* images,              \
                                      const T* gradient, int64_t n) {                             \
    return l2_sums_body(adversarial, images, gradient, n);                                        \
  }                                                                                               \
  SAFER_FAST_CLONES void l2_move_loop(float* adversarial, const float* images, const T* gradient, \
                                      Move move, int64_t n) {                                     \
    l2_move_body(adversarial, images, gradient, move, n);                                         \
  }

SAFER_FAST_ATTACK_LOOPS(float)
SAFER_FAST_ATTACK_LOOPS(at::BFloat16)
SAFER_FAST_ATTACK_LOOPS(at::Half)

// The step and the scale of one image from the partial sums of its chunks, added in order.
Move move_of_image(const Sums* partials, int64_t num_chunks, double step_size, double epsilon) {
  Sums sums;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    sums.gradient += partials[chunk].gradient;
    sums.offset += partials[chunk].offset;
    sums.cross += partials[chunk].cross;
  }
  const double step = sums.gradient == 0 ? 0 : step_size / std::sqrt(sums.gradient);
  const double square = sums.offset + 2 * step * sums.cross + step * step * sums.gradient;
  // Cancellation may leave a tiny negative number; NaN has to stay.
  const double distance = std::sqrt(square < 0 ? 0 : square);
  return {step, distance <= epsilon ? 1 : epsilon / distance};
}

// Calls f(image, start, length) for every chunk of every image, in parallel.
template <typename F>
void for_each_chunk(int64_t num_images, int64_t num_pixels, const F& f) {
  const int64_t num_chunks = at::divup(num_pixels, kChunk);
  at::parallel_for(0, num_images * num_chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % num_chunks * kChunk;
      f(i / num_chunks, start, std::min(kChunk, num_pixels - start));
    }
  });
}

template <typename T>
void l2_step(float* adversarial, const float* images, const T* gradient, int64_t num_images,
             int64_t num_pixels, double step_size, double epsilon) {
  const int64_t num_chunks = at::divup(num_pixels, kChunk);
  std::vector<Sums> partials(num_images * num_chunks);
  for_each_chunk(num_images, num_pixels, [&](int64_t image, int64_t start, int64_t length) {
    const int64_t at = image * num_pixels + start;
    partials[image * num_chunks + start / kChunk] =
        l2_sums_loop(adversarial + at, images + at, gradient + at, length);
  });
  std::vector<Move> moves;
  for (int64_t image = 0; image < num_images; ++image) {
    moves.push_back(move_of_image(&partials[image * num_chunks], num_chunks, step_size, epsilon));
  }
  for_each_chunk(num_images, num_pixels, [&](int64_t image, int64_t start, int64_t length) {
    const int64_t at = image * num_pixels + start;
    l2_move_loop(adversarial + at, images + at, gradient + at, moves[image], length);
  });
}

}  // namespace

// One pass: reads adversarial, images and gradient, writes adversarial; 16 bytes per element in
// fp32.
void linf_step_(const at::Tensor& adversarial, const at::Tensor& images, const at::Tensor& gradient,
                const at::Tensor& step_size, const at::Tensor& epsilon) {
  check_same_memory(adversarial, images);
  check_same_memory(adversarial, gradient);
  float* target = adversarial.mutable_data_ptr<float>();
  const float* source = images.const_data_ptr<float>();
  const float step = scalar_value(step_size);
  const float radius = scalar_value(epsilon);
  with_data(gradient, [&](auto* slope) {
    at::parallel_for(0, adversarial.numel(), kGrain, [&](int64_t begin, int64_t end) {
      linf_step_loop(target + begin, source + begin, slope + begin, step, radius, end - begin);
    });
  });
}

// Two passes: sums, then the update; 28 bytes per element in fp32. ||d|| after the step comes from
// the three sums before it, which saves a third pass and is as good in fp64.
void l2_step_(const at::Tensor& adversarial, const at::Tensor& images, const at::Tensor& gradient,
              const at::Tensor& step_size, const at::Tensor& epsilon) {
  check_same_memory(adversarial, images);
  check_same_memory(adversarial, gradient);
  if (adversarial.numel() == 0) {
    return;
  }
  const int64_t num_images = adversarial.size(0);
  with_data(gradient, [&](auto* slope) {
    l2_step(adversarial.mutable_data_ptr<float>(), images.const_data_ptr<float>(), slope,
            num_images, adversarial.numel() / num_images, scalar_value(step_size),
            scalar_value(epsilon));
  });
}

}  // namespace safer_fast
