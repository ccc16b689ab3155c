// An NVIDIA GPU that is not there, for tests: the part that both APIs share.
//
// Preloaded, the library takes the place of libcudart, libcuda and cuBLAS, so that torch's own code
// for GPUs runs: allocator, streams, graph capture, autograd, Inductor, Triton. Memory is address
// space that is reserved and never touched, kernels compute nothing, and the rules of stream
// capture are enforced as the CUDA documentation states them. It shows which calls a program makes
// and how much memory it asks for. No value and no time that it gives means anything.
#ifndef FAKE_GPU_H
#define FAKE_GPU_H

#include <cuda_runtime_api.h>

// A driver call that CUDA may refuse while a stream is captured; returns its error.
cudaError_t fake_gpu_unsafe(const char* call);
// A kernel or other work on a stream; returns the error of its capture.
cudaError_t fake_gpu_work(cudaStream_t stream, const char* call);
// A kernel, counted.
cudaError_t fake_gpu_launch(cudaStream_t stream);

#endif
