/* A pretended GPU: the part of the CUDA runtime that torch calls for a small network.

   Device memory is host memory, and kernels do nothing: mode.py works their values out. A copy to
   the host arrives only when somebody waits for its stream; until then the target holds NaN. What
   is not defined here is left to the real runtime, which fails for want of a driver.

   Environment: PRETEND_GPUS (1), PRETEND_SM (90, the compute capability), PRETEND_MIB (81920). */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current;
static long long waits, launches, ticket;

long long pretend_waits(void) { return waits; }
long long pretend_launches(void) { return launches; }

static int from_environment(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value && *value ? atoi(value) : otherwise;
}
static int number_of_gpus(void) { return from_environment("PRETEND_GPUS", 1); }
static int capability(void) { return from_environment("PRETEND_SM", 90); }
static size_t capacity(void) { return (size_t)from_environment("PRETEND_MIB", 81920) << 20; }

/* ---------------------------------------------------------------- memory */

typedef struct block {
  char *start;
  size_t size;
  int device; /* -1: pinned memory of the host */
  struct block *next;
} block;
static block *blocks;
static size_t used[16];

static block *block_of(const void *at) {
  block *b = blocks;
  while (b && !((char *)at >= b->start && (char *)at < b->start + b->size)) b = b->next;
  return b;
}

static cudaError_t allocate(void **out, size_t size, int device) {
  *out = NULL;
  pthread_mutex_lock(&lock);
  int fits = device < 0 || used[device] + size <= capacity();
  void *start = fits ? aligned_alloc(512, (size + 512) / 512 * 512) : NULL;
  if (start) {
    block *b = malloc(sizeof *b);
    *b = (block){start, size, device, blocks};
    blocks = b;
    if (device >= 0) used[device] += size;
    *out = start;
  }
  pthread_mutex_unlock(&lock);
  return start ? cudaSuccess : cudaErrorMemoryAllocation;
}

static cudaError_t release(void *start) {
  pthread_mutex_lock(&lock);
  for (block **at = &blocks; *at; at = &(*at)->next) {
    if ((*at)->start != start) continue;
    block *b = *at;
    *at = b->next;
    if (b->device >= 0) used[b->device] -= b->size;
    free(start);
    free(b);
    break;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t size) { return allocate(out, size, current); }
cudaError_t cudaHostAlloc(void **out, size_t size, unsigned f) { return allocate(out, size, -1); }
cudaError_t cudaFree(void *start) { return release(start); }
cudaError_t cudaFreeHost(void *start) { return release(start); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = capacity();
  *unused = *total - used[current];
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *at) {
  memset(out, 0, sizeof *out);
  pthread_mutex_lock(&lock);
  block *b = block_of(at);
  out->type = !b ? cudaMemoryTypeUnregistered : b->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  out->device = b ? b->device : -1;
  out->devicePointer = out->hostPointer = (void *)at;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

/* ---------------------------------------------------------------- copies, which may be late */

typedef struct copy {
  void *target, *values;
  size_t size;
  int device;
  cudaStream_t stream;
  long long ticket;
  struct copy *next;
} copy;
static copy *late;

/* Let arrive what a stream of a device copied up to a ticket. */
static void arrive(int device, cudaStream_t stream, long long upto) {
  pthread_mutex_lock(&lock);
  for (copy **at = &late; *at;) {
    copy *c = *at;
    if (c->device == device && c->stream == stream && c->ticket <= upto) {
      memcpy(c->target, c->values, c->size);
      *at = c->next;
      free(c->values);
      free(c);
    } else {
      at = &c->next;
    }
  }
  pthread_mutex_unlock(&lock);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) {
  if (kind != cudaMemcpyDeviceToHost) {
    memmove(to, from, n);
    return cudaSuccess;
  }
  copy *c = malloc(sizeof *c);
  *c = (copy){to, malloc(n), n, current, s, 0, NULL};
  memcpy(c->values, from, n);
  memset(to, 0xFF, n);
  pthread_mutex_lock(&lock);
  c->ticket = ++ticket;
  copy **at = &late;
  while (*at) at = &(*at)->next;
  *at = c;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  waits++;
  memmove(to, from, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int d, const void *from, int e, size_t n, cudaStream_t s) {
  memmove(to, from, n);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t n) { memset(to, value, n); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t s) { return cudaMemset(to, value, n); }

/* ---------------------------------------------------------------- streams and events */

typedef struct { int device; cudaStream_t stream; long long ticket; } event;
static uintptr_t streams = 4096;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
  *out = (cudaStream_t)(streams += 16);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *out) { *out = 0; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *out, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  *out = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  waits++;
  arrive(current, s, ticket);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  waits++;
  for (copy *c = late; c; c = late) arrive(c->device, c->stream, ticket);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) { *out = calloc(1, sizeof(event)); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
  *(event *)e = (event){current, s, ticket};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  event *recorded = (event *)e;
  waits++;
  arrive(recorded->device, recorded->stream, recorded->ticket);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return cudaSuccess; }

/* ---------------------------------------------------------------- devices and launches */

cudaError_t cudaGetDevice(int *out) { *out = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= number_of_gpus()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *out) { *out = number_of_gpus(); return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *out) { *out = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *out) { *out = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *out, int a, int b) { *out = 1; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int device, unsigned flags) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "pretended GPU");
  out->uuid.bytes[0] = device + 1;
  out->totalGlobalMem = capacity();
  out->major = capability() / 10, out->minor = capability() % 10;
  out->warpSize = 32, out->multiProcessorCount = 132;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->sharedMemPerBlock = 48 << 10, out->sharedMemPerBlockOptin = out->sharedMemPerMultiprocessor = 227 << 10;
  out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 0x7FFFFFFF, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->maxThreadsPerMultiProcessor = 2048, out->maxBlocksPerMultiProcessor = 32;
  out->totalConstMem = 65536, out->l2CacheSize = 50 << 20;
  out->unifiedAddressing = out->canMapHostMemory = out->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr which, int device) {
  struct cudaDeviceProp all;
  cudaGetDeviceProperties(&all, device);
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *out = all.major; break;
    case cudaDevAttrComputeCapabilityMinor: *out = all.minor; break;
    case cudaDevAttrMaxThreadsPerBlock: *out = all.maxThreadsPerBlock; break;
    case cudaDevAttrMultiProcessorCount: *out = all.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *out = all.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = all.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *out = all.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *out = all.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *out = all.maxGridSize[1]; break;
    case cudaDevAttrWarpSize: *out = all.warpSize; break;
    default: *out = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *kernel) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024, out->numRegs = 32, out->maxDynamicSharedSizeBytes = 48 << 10;
  out->ptxVersion = out->binaryVersion = capability();
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute which, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *kernel, int block,
    size_t shared, unsigned flags) {
  *out = 2;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
  static char symbols[1 << 16];
  *out = symbols;
  return cudaSuccess;
}

static cudaError_t launch(dim3 grid) {
  launches++;
  int fits = grid.x && grid.y && grid.z && grid.x <= 0x7FFFFFFF && grid.y <= 65535 && grid.z <= 65535;
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t n, cudaStream_t s) { return launch(grid); }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **a, size_t n, cudaStream_t s) { return launch(grid); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *f, void **a) { return launch(how->gridDim); }
cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *f) { *out = (cudaKernel_t)f; return cudaSuccess; }
char __cudaInitModule(void **module) { return 1; }

/* The driver, which torch asks whether a device is in use. */
static int nothing(void) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *found) {
  int known = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *out = known ? (void *)cuDevicePrimaryCtxGetState : (void *)nothing;
  if (found) *found = 0;
  return cudaSuccess;
}
