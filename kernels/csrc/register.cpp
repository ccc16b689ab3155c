// The only place where the CPU kernels meet the PyTorch dispatcher.

#include <torch/library.h>
#include <torch/version.h>

#include "ops.h"

TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("linf_step_", &safer_fast::linf_step_);
  m.impl("l2_step_", &safer_fast::l2_step_);
  m.impl("sum_squares", &safer_fast::sum_squares);
  m.impl("perturb_", &safer_fast::perturb_);
  m.impl("restore_", &safer_fast::restore_);
}

// What kernels/_library.py compares with the torch that loads the library.
extern "C" const char* safer_fast_torch_version() { return SAFER_FAST_TORCH_VERSION; }
