// cuBLAS of the GPU that is not there: a product is one kernel on the stream of its handle.
//
// Its headers are left out: of dozens of arguments only the handle and the stream are read.
#include <stdlib.h>
#include <string.h>

#include "fake_gpu.h"

typedef struct {
  cudaStream_t stream;
} Handle;

int cublasCreate_v2(Handle** handle) {
  *handle = calloc(1, sizeof **handle);
  return 0;
}

int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}

int cublasGetMathMode(Handle* handle, int* mode) { return *mode = 0; }
int cublasGetPointerMode_v2(Handle* handle, int* mode) { return *mode = 0; }
size_t cublasLtGetVersion(void) { return 130000; }

#define SUCCEEDS(name) \
  int name(void* first) { return 0; }
#define PRODUCT(name) \
  int name(Handle* handle) { return fake_gpu_launch(handle->stream); }

SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDdot_v2)

// ---- cublasLt
// ------------------------------------------------------------------------------------

SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)

static int description;

#define DESCRIBES(name)   \
  int name(void** made) { \
    *made = &description; \
    return 0;             \
  }

DESCRIBES(cublasLtMatmulDescCreate)
DESCRIBES(cublasLtMatmulPreferenceCreate)
DESCRIBES(cublasLtMatrixLayoutCreate)

// A stand-in for cublasLtMatmulHeuristicResult_t.
typedef struct {
  unsigned long long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Heuristic;

int cublasLtMatmulAlgoGetHeuristic(void* handle, void* product, void* a, void* b, void* c, void* d,
                                   void* preference, int requested, Heuristic* results,
                                   int* count) {
  memset(results, 0, sizeof *results);
  *count = 1;
  return 0;
}

int cublasLtMatmul(void* handle, void* product, void* alpha, void* a, void* a_layout, void* b,
                   void* b_layout, void* beta, void* c, void* c_layout, void* d, void* d_layout,
                   void* algorithm, void* workspace, size_t size, cudaStream_t stream) {
  return fake_gpu_launch(stream);
}
