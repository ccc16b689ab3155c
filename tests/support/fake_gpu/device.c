// What the GPU that is not there says about itself: a Hopper, so that Triton compiles for sm_90.
#include <stdio.h>
#include <string.h>

#include "fake_gpu.h"

enum { MULTIPROCESSORS = 132, SHARED_BYTES = 232448, VERSION = 13000 };

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* about, int device) {
  size_t unused, total;
  cudaMemGetInfo(&unused, &total);
  memset(about, 0, sizeof *about);
  strcpy(about->name, "fake GPU");
  about->totalGlobalMem = total;
  about->major = 9;
  about->multiProcessorCount = MULTIPROCESSORS;
  about->warpSize = 32;
  about->maxThreadsPerBlock = 1024;
  about->maxThreadsPerMultiProcessor = 2048;
  about->maxThreadsDim[0] = about->maxThreadsDim[1] = 1024;
  about->maxThreadsDim[2] = 64;
  about->maxGridSize[0] = 0x7fffffff;
  about->maxGridSize[1] = about->maxGridSize[2] = 65535;
  about->regsPerBlock = about->regsPerMultiprocessor = 65536;
  about->sharedMemPerBlock = 49152;
  about->sharedMemPerBlockOptin = SHARED_BYTES;
  about->sharedMemPerMultiprocessor = SHARED_BYTES + 1024;
  about->l2CacheSize = 50 << 20;
  about->textureAlignment = 512;
  about->concurrentKernels = about->unifiedAddressing = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr name, int device) {
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = MULTIPROCESSORS;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 49152;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = SHARED_BYTES;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = SHARED_BYTES + 1024;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    case cudaDevAttrMaxGridDimY:
      *value = 65535;
      break;
    default:
      *value = 1;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:00:00.0");
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* about, const void* kernel) {
  memset(about, 0, sizeof *about);
  about->maxThreadsPerBlock = 1024;
  about->numRegs = 32;
  about->binaryVersion = about->ptxVersion = 90;
  about->maxDynamicSharedSizeBytes = SHARED_BYTES;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* kernel,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
  *count = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void* kernel,
                                                          int threads, size_t shared) {
  *count = 2;
  return cudaSuccess;
}
