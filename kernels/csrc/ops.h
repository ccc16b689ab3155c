// The CPU operations. Shapes, dtypes and devices were checked in Python; what is checked again here
// is only what would corrupt memory. Declared in Python (kernels/*/__init__.py), registered in
// register.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace safer_fast {

void linf_step_(const at::Tensor& adversarial, const at::Tensor& images, const at::Tensor& gradient,
                const at::Tensor& step_size, const at::Tensor& epsilon);

void l2_step_(const at::Tensor& adversarial, const at::Tensor& images, const at::Tensor& gradient,
              const at::Tensor& step_size, const at::Tensor& epsilon);

at::Tensor sum_squares(const at::Tensor& x, const std::optional<at::Tensor>& weight);

void perturb_(const at::Tensor& compute, const at::Tensor& master, const at::Tensor& gradient,
              const at::Tensor& scale, bool adaptive);

void restore_(const at::Tensor& compute, const at::Tensor& master);

}  // namespace safer_fast
