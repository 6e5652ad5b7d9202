// A driver for tests: libcuda.so.1 on host memory, so that the real providers run without a GPU.
//
// Work is done when it is queued, or recorded while a stream is being captured. Addresses and
// handles are checked as the driver checks them. RECALLSEG_STUB_FAIL="cuMemAlloc:2:1" lets a call
// fail with status 2 after it has worked once; fatal statuses (700 and more) stay.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {
using Status = int;
constexpr Status kDone = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidImage = 200,
                 kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500, kUnsupported = 801,
                 kCaptureUnsupported = 900;
constexpr std::size_t kMemory = std::size_t{1} << 30, kGuard = 256;

struct Block {
  std::vector<unsigned char> bytes;
  std::size_t size;
};
struct Stream {
  void* context = nullptr;
  bool capturing = false;
  std::vector<std::function<void()>> work;
};
struct Event {
  double time = -1;
};
struct Graph {
  std::vector<std::function<void()>> work;
};

std::recursive_mutex lock;
std::map<std::uintptr_t, Block> device_blocks, pinned_blocks;
std::set<void*> streams, events, graphs, modules;
thread_local void* current = nullptr;
thread_local std::vector<void*> below;  // contexts that were current before it
Status dead = 0;
double now = 0;
std::map<std::string, int> calls;
char primary, function_fill;

// Counts a call and says whether it has been told to fail.
Status enter(const char* name) {
  int before = calls[name]++;
  if (dead) return dead;
  const char* told = std::getenv("RECALLSEG_STUB_FAIL");
  if (!told) return kDone;
  std::string text(told);
  auto first = text.find(':'), second = text.find(':', first + 1);
  if (text.substr(0, first) != name) return kDone;
  int status = std::atoi(text.c_str() + first + 1), after = std::atoi(text.c_str() + second + 1);
  // PyCUDA collects garbage and tries again when memory is short.
  if (before < after || (before > after && status != kOutOfMemory)) return kDone;
  if (status >= 700 && status < 800) dead = status;
  return status;
}

bool inside(std::uintptr_t address, std::size_t size) {
  for (auto* blocks : {&device_blocks, &pinned_blocks})
    for (auto& [start, block] : *blocks)
      if (start <= address && address + size <= start + block.size) return true;
  return false;
}

std::size_t used() {
  std::size_t sum = 0;
  for (auto& [start, block] : device_blocks) sum += block.size;
  return sum;
}

std::uintptr_t keep(std::map<std::uintptr_t, Block>& blocks, std::size_t size) {
  Block block{std::vector<unsigned char>(size + 2 * kGuard, 0xcd), size};
  auto raw = reinterpret_cast<std::uintptr_t>(block.bytes.data());
  auto start = (raw + kGuard - 1) / kGuard * kGuard;
  blocks.emplace(start, std::move(block));
  return start;
}

// What lies behind a block must be as it was: somebody wrote past its end otherwise.
bool whole(std::uintptr_t start, const Block& block) {
  auto* end = reinterpret_cast<unsigned char*>(start) + block.size;
  for (std::size_t i = 0; i < 16; ++i)
    if (end[i] != 0xcd) return false;
  return true;
}

Status queue(void* stream, std::function<void()> work) {
  if (stream) {
    if (!streams.count(stream)) return kInvalidHandle;
    auto* s = static_cast<Stream*>(stream);
    if (s->capturing) {
      s->work.push_back(std::move(work));
      return kDone;
    }
  }
  work();
  return kDone;
}
}  // namespace

#define ENTER(name)                                   \
  std::lock_guard<std::recursive_mutex> guard(lock);  \
  if (Status told = enter(name)) return told
#define ENTER_CONTEXT(name) \
  ENTER(name);              \
  if (!current) return kInvalidContext

extern "C" {
int stub_live() {
  std::lock_guard<std::recursive_mutex> guard(lock);
  return static_cast<int>(device_blocks.size() + pinned_blocks.size());
}
int stub_calls(const char* name) { return calls[name]; }
int stub_overruns() {
  int found = 0;
  for (auto* blocks : {&device_blocks, &pinned_blocks})
    for (auto& [start, block] : *blocks) found += !whole(start, block);
  return found;
}

Status cuGetErrorString(Status status, const char** text) {
  static const std::map<Status, const char*> words{
      {1, "invalid argument"}, {2, "out of memory"}, {3, "driver shutting down"},
      {35, "CUDA driver version is insufficient for CUDA runtime version"},
      {100, "no CUDA-capable device is detected"}, {200, "device kernel image is invalid"},
      {201, "invalid device context"}, {400, "invalid resource handle"},
      {500, "named symbol not found"}, {700, "an illegal memory access was encountered"},
      {719, "unspecified launch failure"}, {801, "operation not supported"},
      {803, "system has unsupported display driver / cuda driver combination"},
      {900, "operation not permitted when stream is capturing"}, {999, "unknown error"}};
  auto found = words.find(status);
  *text = found == words.end() ? nullptr : found->second;
  return found == words.end() ? kInvalidValue : kDone;
}
Status cuGetErrorName(Status status, const char** text) { return cuGetErrorString(status, text); }

Status cuInit(unsigned) { ENTER("cuInit"); return kDone; }
Status cuDriverGetVersion(int* version) {
  const char* told = std::getenv("RECALLSEG_STUB_VERSION");
  *version = told ? std::atoi(told) : 13000;
  return kDone;
}
Status cuDeviceGetCount(int* count) {
  const char* told = std::getenv("RECALLSEG_STUB_DEVICES");
  *count = told ? std::atoi(told) : 1;
  return kDone;
}
Status cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal ? 101 : kDone; }
Status cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "Stub", static_cast<std::size_t>(size));
  return kDone;
}
Status cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : 0;
  return kDone;
}
Status cuDeviceTotalMem_v2(std::size_t* bytes, int) { *bytes = kMemory; return kDone; }
Status cuDeviceGetPCIBusId(char* id, int size, int) {
  std::strncpy(id, "0000:01:00.0", static_cast<std::size_t>(size));
  return kDone;
}
Status cuDevicePrimaryCtxRetain(void** context, int) {
  ENTER("cuDevicePrimaryCtxRetain");
  *context = &primary;
  return kDone;
}
Status cuDevicePrimaryCtxRelease_v2(int) { return kDone; }
Status cuCtxGetCurrent(void** context) { *context = current; return kDone; }
Status cuCtxSetCurrent(void* context) { ENTER("cuCtxSetCurrent"); current = context; return kDone; }
Status cuCtxPushCurrent_v2(void* context) {
  below.push_back(current);
  current = context;
  return kDone;
}
Status cuCtxPopCurrent_v2(void** context) {
  if (!current) return kInvalidContext;
  if (context) *context = current;
  current = below.empty() ? nullptr : below.back();
  if (!below.empty()) below.pop_back();
  return kDone;
}
Status cuCtxGetDevice(int* device) { *device = 0; return current ? kDone : kInvalidContext; }
Status cuCtxSynchronize() { ENTER_CONTEXT("cuCtxSynchronize"); return kDone; }

Status cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  ENTER_CONTEXT("cuMemGetInfo");
  *free = kMemory - used();
  *total = kMemory;
  return kDone;
}
Status cuMemAlloc_v2(std::uintptr_t* address, std::size_t size) {
  ENTER_CONTEXT("cuMemAlloc");
  if (!size) return kInvalidValue;
  if (size > kMemory - used()) return kOutOfMemory;
  *address = keep(device_blocks, size);
  return kDone;
}
Status cuMemFree_v2(std::uintptr_t address) {
  ENTER_CONTEXT("cuMemFree");
  auto found = device_blocks.find(address);
  if (found == device_blocks.end()) return kInvalidValue;
  if (!whole(address, found->second)) std::abort();
  device_blocks.erase(found);
  return kDone;
}
Status cuMemHostAlloc(void** host, std::size_t size, unsigned) {
  ENTER_CONTEXT("cuMemHostAlloc");
  *host = reinterpret_cast<void*>(keep(pinned_blocks, size));
  return kDone;
}
Status cuMemFreeHost(void* host) {
  ENTER_CONTEXT("cuMemFreeHost");
  return pinned_blocks.erase(reinterpret_cast<std::uintptr_t>(host)) ? kDone : kInvalidValue;
}
Status cuMemHostGetDevicePointer_v2(std::uintptr_t* address, void* host, unsigned) {
  *address = reinterpret_cast<std::uintptr_t>(host);
  return pinned_blocks.count(*address) ? kDone : kInvalidValue;
}
Status cuPointerGetAttribute(void* value, int, std::uintptr_t address) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  *static_cast<int*>(value) = 0;
  return inside(address, 1) ? kDone : kInvalidValue;
}
Status cuMemGetAddressRange_v2(std::uintptr_t* base, std::size_t* size, std::uintptr_t address) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  for (auto& [start, block] : device_blocks)
    if (start <= address && address < start + block.size) {
      if (base) *base = start;
      if (size) *size = block.size;
      return kDone;
    }
  return kNotFound;
}

Status cuMemcpyHtoDAsync_v2(std::uintptr_t target, const void* host, std::size_t size, void* stream) {
  ENTER_CONTEXT("cuMemcpyHtoDAsync");
  if (!inside(target, size)) return kInvalidValue;
  return queue(stream, [=] { std::memcpy(reinterpret_cast<void*>(target), host, size); });
}
Status cuMemcpyDtoHAsync_v2(void* host, std::uintptr_t source, std::size_t size, void* stream) {
  ENTER_CONTEXT("cuMemcpyDtoHAsync");
  if (!inside(source, size)) return kInvalidValue;
  return queue(stream, [=] { std::memcpy(host, reinterpret_cast<void*>(source), size); });
}
Status cuMemcpyDtoDAsync_v2(std::uintptr_t target, std::uintptr_t source, std::size_t size,
                            void* stream) {
  ENTER_CONTEXT("cuMemcpyDtoDAsync");
  if (!inside(target, size) || !inside(source, size)) return kInvalidValue;
  return queue(stream, [=] {
    std::memmove(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), size);
  });
}
Status cuMemsetD8Async(std::uintptr_t target, unsigned char value, std::size_t size, void* stream) {
  ENTER_CONTEXT("cuMemsetD8Async");
  if (!inside(target, size)) return kInvalidValue;
  return queue(stream, [=] { std::memset(reinterpret_cast<void*>(target), value, size); });
}

Status cuStreamCreate(void** stream, unsigned) {
  ENTER_CONTEXT("cuStreamCreate");
  auto* made = new Stream;
  made->context = current;
  streams.insert(*stream = made);
  return kDone;
}
Status cuStreamGetCtx(void* stream, void** context) {
  ENTER_CONTEXT("cuStreamGetCtx");
  if (!streams.count(stream)) return kInvalidHandle;
  *context = static_cast<Stream*>(stream)->context;
  return kDone;
}
Status cuStreamGetCtx_v2(void* stream, void** context, void** green) {
  if (green) *green = nullptr;
  return cuStreamGetCtx(stream, context);
}
Status cuStreamDestroy_v2(void* stream) {
  ENTER("cuStreamDestroy");
  if (!streams.erase(stream)) return kInvalidHandle;
  delete static_cast<Stream*>(stream);
  return kDone;
}
Status cuStreamSynchronize(void* stream) {
  ENTER_CONTEXT("cuStreamSynchronize");
  if (!stream) return kDone;
  if (!streams.count(stream)) return kInvalidHandle;
  return static_cast<Stream*>(stream)->capturing ? kCaptureUnsupported : kDone;
}
Status cuStreamWaitEvent(void* stream, void* event, unsigned) {
  ENTER_CONTEXT("cuStreamWaitEvent");
  return streams.count(stream) && events.count(event) ? kDone : kInvalidHandle;
}
Status cuEventCreate(void** event, unsigned) {
  ENTER_CONTEXT("cuEventCreate");
  events.insert(*event = new Event);
  return kDone;
}
Status cuEventDestroy_v2(void* event) {
  ENTER("cuEventDestroy");
  if (!events.erase(event)) return kInvalidHandle;
  delete static_cast<Event*>(event);
  return kDone;
}
Status cuEventRecord(void* event, void* stream) {
  ENTER_CONTEXT("cuEventRecord");
  if (!events.count(event) || (stream && !streams.count(stream))) return kInvalidHandle;
  static_cast<Event*>(event)->time = ++now;
  return kDone;
}
Status cuEventSynchronize(void* event) {
  ENTER_CONTEXT("cuEventSynchronize");
  return events.count(event) ? kDone : kInvalidHandle;
}
Status cuEventElapsedTime_v2(float* ms, void* start, void* end) {
  if (!events.count(start) || !events.count(end)) return kInvalidHandle;
  *ms = static_cast<float>(static_cast<Event*>(end)->time - static_cast<Event*>(start)->time);
  return kDone;
}

Status cuStreamBeginCapture_v2(void* stream, int) {
  ENTER_CONTEXT("cuStreamBeginCapture");
  if (!streams.count(stream)) return kInvalidHandle;
  auto* s = static_cast<Stream*>(stream);
  s->capturing = true;
  s->work.clear();
  return kDone;
}
Status cuStreamEndCapture(void* stream, void** graph) {
  ENTER_CONTEXT("cuStreamEndCapture");
  auto* s = static_cast<Stream*>(stream);
  if (!s->capturing) return kInvalidValue;
  s->capturing = false;
  graphs.insert(*graph = new Graph{s->work});
  return kDone;
}
Status cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  ENTER_CONTEXT("cuGraphInstantiate");
  if (!graphs.count(graph)) return kInvalidHandle;
  graphs.insert(*executable = new Graph(*static_cast<Graph*>(graph)));
  return kDone;
}
Status cuGraphDestroy(void* graph) {
  if (!graphs.erase(graph)) return kInvalidHandle;
  delete static_cast<Graph*>(graph);
  return kDone;
}
Status cuGraphExecDestroy(void* graph) { return cuGraphDestroy(graph); }
Status cuGraphLaunch(void* executable, void* stream) {
  ENTER_CONTEXT("cuGraphLaunch");
  if (!graphs.count(executable)) return kInvalidHandle;
  for (auto& work : static_cast<Graph*>(executable)->work)
    if (Status status = queue(stream, work)) return status;
  return kDone;
}

// The one kernel: fill_bytes(address, count, value), see device_checks.py.
Status cuModuleLoadData(void** module, const void* image) {
  ENTER_CONTEXT("cuModuleLoadData");
  if (!std::strstr(static_cast<const char*>(image), "fill_bytes")) return kInvalidImage;
  modules.insert(*module = new char);
  return kDone;
}
Status cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
  return cuModuleLoadData(module, image);
}
Status cuModuleUnload(void* module) {
  if (!modules.erase(module)) return kInvalidHandle;
  delete static_cast<char*>(module);
  return kDone;
}
Status cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER_CONTEXT("cuModuleGetFunction");
  if (!modules.count(module)) return kInvalidHandle;
  *function = &function_fill;
  return std::strcmp(name, "fill_bytes") ? kNotFound : kDone;
}
Status cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                      unsigned bz, unsigned, void* stream, void** params, void** extra) {
  ENTER_CONTEXT("cuLaunchKernel");
  if (function != &function_fill || gy * gz * by * bz != 1) return kInvalidValue;
  struct Arguments {
    std::uint64_t address;
    std::uint32_t count, value;
  } arguments;
  if (params) {
    std::memcpy(&arguments.address, params[0], 8);
    std::memcpy(&arguments.count, params[1], 4);
    std::memcpy(&arguments.value, params[2], 4);
  } else {
    if (*static_cast<std::size_t*>(extra[3]) != sizeof arguments) return kInvalidValue;
    std::memcpy(&arguments, extra[1], sizeof arguments);
  }
  std::size_t count = arguments.count;
  if (count > std::size_t{gx} * bx) count = std::size_t{gx} * bx;
  if (!inside(arguments.address, count)) {
    dead = 700;
    return kDone;  // a kernel's mistake is noticed later
  }
  return queue(stream, [=] {
    std::memset(reinterpret_cast<void*>(arguments.address), static_cast<int>(arguments.value), count);
  });
}

Status cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t, int* found) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  std::string versioned = std::string(name) + "_v2";
  *function = dlsym(self, versioned.c_str());
  if (!*function) *function = dlsym(self, name);
  if (found) *found = *function ? 0 : 1;
  return *function ? kDone : kNotFound;
}
Status cuGetProcAddress(const char* name, void** function, int version, std::uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
