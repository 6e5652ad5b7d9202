// The caller's memory: its layout is checked, then wrapped for Python and taken back.
#pragma once

#include <cstdint>
#include <vector>

#include "python.h"

namespace capi {

enum class Access { kRead, kWrite };

// Where memory lies: on a GPU with the stream on which it is ready.
struct Place {
  bool on_gpu = false;
  long long stream = 0;  // 0: ready now
};

// E_ARGUMENT for a location that there is none of, or a stream of the host's memory.
Place place_of(const char* name, std::int32_t location, void* stream);

struct Layout {
  char* lowest = nullptr;
  std::size_t bytes = 0;
  std::size_t offset = 0;  // of element (0, 0) from the lowest
  const char* dtype = "";
  std::vector<std::int64_t> shape, strides;
  Place place;
};

// Check and complete a layout; all-zero strides mean packed. Throws E_ARGUMENT for a null or
// misaligned pointer, sides out of range, strides that overlap (writing) or leave the address space.
Layout layout_of(const char* name, const void* data, std::int32_t dtype,
                 std::vector<std::int64_t> shape, std::vector<std::int64_t> strides,
                 Access access);

// Check an image: its layout, spacing and place.
Layout layout_of(const recallseg_image& image);

// Memory lent to Python for the length of one call.
class Loan {
 public:
  // What embedding.py calls Pixels.
  Ref lend(const Layout& layout, Access access);
  // Take everything back; E_INTERNAL if Python still holds on to it.
  void take_back();

 private:
  std::vector<Ref> views_;
};

// Run `body(loan)` and take the memory back whether or not it throws; under the GIL.
template <typename Body>
auto with_loan(Body&& body) {
  Loan loan;
  try {
    auto result = body(loan);
    loan.take_back();
    return result;
  } catch (...) {
    loan.take_back();
    throw;
  }
}

}  // namespace capi
