#include "handles.h"

#include <mutex>
#include <utility>
#include <vector>

namespace capi {
namespace {

static_assert(sizeof(std::uintptr_t) == 8, "a handle holds a generation, a slot and a kind");

constexpr unsigned kKindBits = 4, kSlotBits = 20;
constexpr std::uint64_t kMostSlots = std::uint64_t{1} << kSlotBits;

struct Slot {
  std::uint64_t generation = 1;
  Kind kind = Kind::kLibrary;
  std::shared_ptr<Object> object;
};

// Never destroyed: other threads may be in a call while the process exits.
struct Table {
  std::mutex mutex;
  std::vector<Slot> slots;
  std::vector<std::uint64_t> free;  // has room for every slot, so that closing needs no memory
};

Table& table() {
  static auto* const one = new Table;
  return *one;
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kLibrary: return "library";
    case Kind::kSegmenter: return "segmenter";
    case Kind::kResult: return "result";
    case Kind::kStream: return "stream";
    case Kind::kList: return "list";
    case Kind::kAudit: return "audit log";
  }
  return "handle";
}

// The slot of an open handle; under the mutex.
Slot& slot_of(Table& all, Kind kind, std::uintptr_t handle) {
  const std::uint64_t slot = (handle >> kKindBits) % kMostSlots;
  if (handle == 0) throw Error(RECALLSEG_E_HANDLE, std::string(name_of(kind)) + " is null");
  if ((handle & ((1u << kKindBits) - 1)) != static_cast<std::uint64_t>(kind) ||
      slot >= all.slots.size())
    throw Error(RECALLSEG_E_HANDLE, std::string("this is no ") + name_of(kind));
  Slot& found = all.slots[slot];
  if (found.object == nullptr || found.kind != kind ||
      found.generation != handle >> (kKindBits + kSlotBits))
    throw Error(RECALLSEG_E_HANDLE, std::string("the ") + name_of(kind) + " is closed");
  return found;
}

}  // namespace

std::uintptr_t insert_object(Kind kind, std::shared_ptr<Object> object) {
  Table& all = table();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (all.free.empty()) {
    if (all.slots.size() == kMostSlots)
      throw Error(RECALLSEG_E_MEMORY,
                  std::to_string(kMostSlots) + " handles are open: close those of old results");
    all.free.reserve(all.slots.size() + 1);  // so that remove_object needs no memory
    all.slots.emplace_back();
    all.free.push_back(all.slots.size() - 1);
  }
  const std::uint64_t slot = all.free.back();
  all.free.pop_back();
  all.slots[slot].kind = kind;
  all.slots[slot].object = std::move(object);
  return all.slots[slot].generation << (kKindBits + kSlotBits) | slot << kKindBits |
         static_cast<std::uint64_t>(kind);
}

std::shared_ptr<Object> find_object(Kind kind, std::uintptr_t handle) {
  Table& all = table();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return slot_of(all, kind, handle).object;
}

std::shared_ptr<Object> remove_object(Kind kind, std::uintptr_t handle) {
  Table& all = table();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Slot& slot = slot_of(all, kind, handle);
  ++slot.generation;
  all.free.push_back(static_cast<std::uint64_t>(&slot - all.slots.data()));
  return std::move(slot.object);
}

void close_all_handles() {
  Table& all = table();
  for (std::uint64_t i = 0;; ++i) {
    std::shared_ptr<Object> closed;  // one by one takes no memory
    {
      const std::lock_guard<std::mutex> lock(all.mutex);
      if (i >= all.slots.size()) return;
      Slot& slot = all.slots[i];
      if (slot.object == nullptr) continue;
      closed = std::move(slot.object);
      slot.object.reset();
      ++slot.generation;
      all.free.push_back(i);
    }
    closed->stop();
  }
}

}  // namespace capi
