// The CUDA runtime of the GPU that is not there; see fake_gpu.h.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fake_gpu.h"

// What tests read: see `read_counts` in fake_gpu.py for the order.
static struct {
  long launches, graph_launches, waits, copies_in, copies_out, allocations, violations, bytes_used;
} counts;
static size_t bytes_total = (size_t)139 << 30;
static char last_violation[200];

void fake_gpu_counts(long* values) { memcpy(values, &counts, sizeof counts); }
const char* fake_gpu_last_violation(void) { return last_violation; }
void fake_gpu_set_memory(double gib) { bytes_total = (size_t)(gib * (1 << 30)); }

static __thread cudaError_t last_error;

static cudaError_t failed(cudaError_t error) {
  if (error) last_error = error;
  return error;
}

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorFake" : "cudaSuccess"; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    default:
      return "error of the fake GPU";
  }
}

// ---- Captures
// ------------------------------------------------------------------------------------

typedef struct Capture {
  unsigned long long id;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  struct Stream* origin;
  int is_invalid;
  size_t num_nodes;
  struct Capture* next;  // of the captures that are under way
} Capture;

typedef struct Stream {
  unsigned flags;
  Capture* capture;  // that its work goes into, or null
  int is_unjoined;   // it has work that the capture's first stream does not wait for
  struct Stream* next;
} Stream;

typedef struct {
  int is_recorded;
  Stream* stream;
  unsigned long long capture_id;  // of the capture it was recorded in, or 0
} Event;

typedef struct {
  size_t num_nodes;
} Graph;

static Stream legacy_stream, thread_stream, *streams;
static Capture* captures;
static unsigned long long num_captures;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Stream* stream_of(cudaStream_t stream) {
  if (stream == NULL || stream == cudaStreamLegacy) return &legacy_stream;
  if (stream == cudaStreamPerThread) return &thread_stream;
  return (Stream*)stream;
}

// Count a broken rule, and end the capture as CUDA does: with an error, when it is asked for.
static cudaError_t violated(Capture* capture, const char* call, cudaError_t error) {
  counts.violations++;
  snprintf(last_violation, sizeof last_violation, "%s: %s", call, cudaGetErrorString(error));
  if (capture) capture->is_invalid = 1;
  return failed(error);
}

static Capture* capture_by_id(unsigned long long id) {
  Capture* capture = captures;
  while (capture && capture->id != id) capture = capture->next;
  return capture;
}

// The capture that forbids unsafe calls to this thread, by cudaThreadExchangeStreamCaptureMode.
static Capture* forbidding_capture(void) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return NULL;
  for (Capture* capture = captures; capture; capture = capture->next) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    if (pthread_equal(capture->thread, pthread_self())) return capture;
    if (capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal)
      return capture;
  }
  return NULL;
}

cudaError_t fake_gpu_unsafe(const char* call) {
  Capture* capture = forbidding_capture();
  return capture ? violated(capture, call, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

#define REFUSE_IN_CAPTURE(call)                \
  do {                                         \
    cudaError_t error = fake_gpu_unsafe(call); \
    if (error) return error;                   \
  } while (0)

cudaError_t fake_gpu_work(cudaStream_t given, const char* call) {
  Stream* stream = stream_of(given);
  if (stream->capture) {
    if (stream->capture->is_invalid) return failed(cudaErrorStreamCaptureInvalidated);
    stream->capture->num_nodes++;
    stream->is_unjoined = stream != stream->capture->origin;
  }
  if (stream == &legacy_stream)
    for (Capture* capture = captures; capture; capture = capture->next)
      if (!(capture->origin->flags & cudaStreamNonBlocking))
        return violated(capture, call, cudaErrorStreamCaptureImplicit);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t given, enum cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(given);
  if (stream->capture || stream == &legacy_stream)
    return violated(stream->capture, "cudaStreamBeginCapture", cudaErrorStreamCaptureUnsupported);
  Capture* capture = calloc(1, sizeof *capture);
  *capture = (Capture){++num_captures, mode, pthread_self(), stream, 0, 0, captures};
  captures = stream->capture = capture;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t given, cudaGraph_t* graph) {
  Stream* stream = stream_of(given);
  Capture* capture = stream->capture;
  *graph = NULL;
  if (!capture || capture->origin != stream) return failed(cudaErrorIllegalState);
  int is_unjoined = 0;
  for (Stream* other = streams; other; other = other->next)
    if (other->capture == capture) {
      is_unjoined |= other->is_unjoined;
      other->capture = NULL;
      other->is_unjoined = 0;
    }
  Capture** place = &captures;
  while (*place != capture) place = &(*place)->next;
  *place = capture->next;
  cudaError_t error = cudaSuccess;
  if (capture->is_invalid)
    error = failed(cudaErrorStreamCaptureInvalidated);
  else if (is_unjoined)
    error = violated(NULL, "cudaStreamEndCapture", cudaErrorStreamCaptureUnjoined);
  else {
    Graph* made = calloc(1, sizeof *made);
    made->num_nodes = capture->num_nodes;
    *graph = (cudaGraph_t)made;
  }
  free(capture);
  return error;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t given, enum cudaStreamCaptureStatus* status) {
  Capture* capture = stream_of(given)->capture;
  *status = cudaStreamCaptureStatusNone;
  if (capture)
    *status =
        capture->is_invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t given, enum cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  cudaStreamIsCapturing(given, status);
  if (*status == cudaStreamCaptureStatusNone) return cudaSuccess;
  if (id) *id = stream_of(given)->capture->id;
  if (graph) *graph = (cudaGraph_t)stream_of(given)->capture;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (num_dependencies) *num_dependencies = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t* nodes,
                                                const cudaGraphEdgeData* edges, size_t count,
                                                unsigned flags) {
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = ((Graph*)graph)->num_nodes;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long flags) {
  REFUSE_IN_CAPTURE("cudaGraphInstantiate");
  *executable = malloc(1);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  counts.graph_launches++;
  return fake_gpu_work(stream, "cudaGraphLaunch");
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  free(executable);
  return cudaSuccess;
}

// ---- Streams and events
// --------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  Stream* made = calloc(1, sizeof *made);
  made->flags = flags;
  pthread_mutex_lock(&lock);
  made->next = streams;
  streams = made;
  pthread_mutex_unlock(&lock);
  *stream = (cudaStream_t)made;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t given, cudaStream_t stream, unsigned flags) {
  Event* event = (Event*)given;
  int was_unjoined = stream_of(stream)->is_unjoined;
  cudaError_t error = fake_gpu_work(stream, "cudaEventRecord");
  if (error) return error;
  stream_of(stream)->is_unjoined = was_unjoined;
  Capture* capture = stream_of(stream)->capture;
  *event = (Event){1, stream_of(stream), capture ? capture->id : 0};
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

static cudaError_t ask_event(cudaEvent_t event, const char* call) {
  Capture* capture = capture_by_id(((Event*)event)->capture_id);
  if (capture) return violated(capture, call, cudaErrorCapturedEvent);
  return fake_gpu_unsafe(call);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return ask_event(event, "cudaEventQuery"); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  counts.waits++;
  return ask_event(event, "cudaEventSynchronize");
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t given, cudaEvent_t waited_for, unsigned flags) {
  Stream* stream = stream_of(given);
  Event* event = (Event*)waited_for;
  if (!event->is_recorded) return cudaSuccess;
  Capture* from = capture_by_id(event->capture_id);
  if (stream->capture && stream->capture->is_invalid)
    return failed(cudaErrorStreamCaptureInvalidated);
  if (stream->capture != from && stream->capture)
    return violated(stream->capture, "cudaStreamWaitEvent", cudaErrorStreamCaptureIsolation);
  if (from && !stream->capture) {  // the stream joins the capture, and must come back
    stream->capture = from;
    stream->is_unjoined = 1;
  } else if (from) {
    event->stream->is_unjoined = 0;
  }
  return cudaSuccess;
}

// ---- Waits
// ---------------------------------------------------------------------------------------

cudaError_t cudaDeviceSynchronize(void) {
  counts.waits++;
  return fake_gpu_unsafe("cudaDeviceSynchronize");
}

static cudaError_t ask_stream(cudaStream_t stream, const char* call) {
  Capture* capture = stream_of(stream)->capture;
  return capture ? violated(capture, call, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return ask_stream(stream, "cudaStreamQuery"); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  counts.waits++;
  return ask_stream(stream, "cudaStreamSynchronize");
}

// ---- Memory
// --------------------------------------------------------------------------------------

typedef struct Block {
  char* start;
  size_t size;
  int is_host;  // pinned memory of the host
  struct Block* next;
} Block;
static Block* blocks;

static cudaError_t reserve(void** start, size_t size, int is_host) {
  pthread_mutex_lock(&lock);
  cudaError_t error = cudaErrorMemoryAllocation;
  if (is_host || counts.bytes_used + size <= bytes_total) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* mapped = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped != MAP_FAILED) {
      Block* block = malloc(sizeof *block);
      *block = (Block){mapped, size ? size : 1, is_host, blocks};
      blocks = block;
      if (!is_host) counts.bytes_used += size;
      *start = mapped;
      error = cudaSuccess;
    }
  }
  pthread_mutex_unlock(&lock);
  return failed(error);
}

static cudaError_t give_back(void* start) {
  pthread_mutex_lock(&lock);
  for (Block** place = &blocks; *place; place = &(*place)->next)
    if ((*place)->start == start) {
      Block* block = *place;
      *place = block->next;
      if (!block->is_host) counts.bytes_used -= block->size;
      munmap(block->start, block->size);
      free(block);
      break;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

static int is_on_device(const void* pointer) {
  const char* place = pointer;
  pthread_mutex_lock(&lock);
  Block* block = blocks;
  while (block && !(block->start <= place && place < block->start + block->size))
    block = block->next;
  int answer = block && !block->is_host;
  pthread_mutex_unlock(&lock);
  return answer;
}

cudaError_t cudaMalloc(void** start, size_t size) {
  REFUSE_IN_CAPTURE("cudaMalloc");
  counts.allocations++;
  return reserve(start, size, 0);
}

cudaError_t cudaFree(void* start) {
  REFUSE_IN_CAPTURE("cudaFree");
  return give_back(start);
}

cudaError_t cudaHostAlloc(void** start, size_t size, unsigned flags) {
  REFUSE_IN_CAPTURE("cudaHostAlloc");
  return reserve(start, size, 1);
}

cudaError_t cudaFreeHost(void* start) {
  REFUSE_IN_CAPTURE("cudaFreeHost");
  return give_back(start);
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = bytes_total - counts.bytes_used;
  *total = bytes_total;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes,
                                     const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = is_on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = (void*)pointer;
  return cudaSuccess;
}

// Nothing is stored on the device. What the host reads from it is zeros, but for a single byte,
// which is 1: a condition that is asked for holds.
static cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
  int is_in = is_on_device(to) && !is_on_device(from);
  int is_out = !is_on_device(to) && is_on_device(from);
  cudaError_t error = fake_gpu_work(stream, "cudaMemcpyAsync");
  if (error) return error;
  counts.copies_in += is_in;
  counts.copies_out += is_out;
  // a graph would read and write the very same memory of the host in every replay
  Capture* capture = stream_of(stream)->capture;
  if (capture && (is_in || is_out))
    return violated(capture, "a copy of the host's memory", cudaErrorStreamCaptureUnsupported);
  if (is_out) memset(to, size == 1, size);
  if (!is_on_device(to) && !is_on_device(from)) memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return copy(to, from, size, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  REFUSE_IN_CAPTURE("cudaMemcpy");
  counts.waits++;
  return copy(to, from, size, NULL);
}

cudaError_t cudaMemset(void* to, int value, size_t size) {
  REFUSE_IN_CAPTURE("cudaMemset");
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  return fake_gpu_work(stream, "cudaMemsetAsync");
}

// ---- Kernels
// -------------------------------------------------------------------------------------

cudaError_t fake_gpu_launch(cudaStream_t stream) {
  cudaError_t error = fake_gpu_work(stream, "a kernel");
  counts.launches += error == cudaSuccess;
  return error;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  return fake_gpu_launch(stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return fake_gpu_launch(stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                        size_t shared, cudaStream_t stream) {
  return fake_gpu_launch(stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  return fake_gpu_launch(config->stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (!stream_of(stream)->capture) function(data);
  return cudaSuccess;
}

// Code that nvcc generates registers its kernels, and passes the shape of a launch through these.
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} launch_shape;
static void* binary;

void** __cudaRegisterFatBinary(void* image) { return &binary; }
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
char __cudaInitModule(void** handle) { return 1; }
void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external,
                       size_t size, int constant, int global) {}
void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name,
                            int limit, void* tid, void* bid, void* block, void* grid, int* warp) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                     struct CUstream_st* stream) {
  launch_shape.grid = grid;
  launch_shape.block = block;
  launch_shape.shared = shared;
  launch_shape.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = launch_shape.grid;
  *block = launch_shape.block;
  *shared = launch_shape.shared;
  *(void**)stream = launch_shape.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, enum cudaFuncAttribute name, int value) {
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = (void*)symbol;
  return cudaSuccess;
}
