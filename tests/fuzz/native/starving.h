// Allocations that fail: operator new of the whole program, and which of its calls fail. Include it in
// one file of a program.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace starving {

inline thread_local bool counting = false;
inline thread_local long at = 0, count = 0, fired = 0;  // at 0: only counted
inline thread_local bool lasting = false;
inline const char* const* of = nullptr;  // parts of the names of files whose calls count; null: all

inline bool fails(const void* caller) {
  if (!counting) return false;
  if (of != nullptr) {
    counting = false;  // dladdr may allocate
    Dl_info found{};
    bool counts = dladdr(caller, &found) != 0 && found.dli_fname != nullptr;
    if (counts) {
      counts = false;
      for (const char* const* part = of; *part != nullptr; ++part)
        counts = counts || std::strstr(found.dli_fname, *part) != nullptr;
    }
    counting = true;
    if (!counts) return false;
  }
  ++count;
  const bool now = at != 0 && (count == at || (lasting && count > at));
  fired += now;
  return now;
}

// Lets the n-th allocation of this thread fail, or all from there on; until the end of the scope.
class Starved {
 public:
  explicit Starved(long number, bool on = false) {
    at = number;
    count = fired = 0;
    lasting = on;
    counting = true;
  }
  ~Starved() { counting = false; }
  Starved(const Starved&) = delete;
  Starved& operator=(const Starved&) = delete;
};

// What is not under test allocates as it likes.
class Fed {
 public:
  Fed() : before_(counting) { counting = false; }
  ~Fed() { counting = before_; }
  Fed(const Fed&) = delete;
  Fed& operator=(const Fed&) = delete;

 private:
  bool before_;
};

inline void* take(std::size_t size, const void* caller) {
  return fails(caller) ? nullptr : std::malloc(size == 0 ? 1 : size);
}

}  // namespace starving

__attribute__((noinline)) void* operator new(std::size_t size) {
  if (void* place = starving::take(size, __builtin_return_address(0))) return place;
  throw std::bad_alloc();
}
__attribute__((noinline)) void* operator new[](std::size_t size) {
  if (void* place = starving::take(size, __builtin_return_address(0))) return place;
  throw std::bad_alloc();
}
__attribute__((noinline)) void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return starving::take(size, __builtin_return_address(0));
}
__attribute__((noinline)) void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return starving::take(size, __builtin_return_address(0));
}
void operator delete(void* place) noexcept { std::free(place); }
void operator delete[](void* place) noexcept { std::free(place); }
void operator delete(void* place, std::size_t) noexcept { std::free(place); }
void operator delete[](void* place, std::size_t) noexcept { std::free(place); }
