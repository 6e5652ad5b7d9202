// What a fuzzer's bytes are turned into: numbers, and memory that ends where it is said to end.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

namespace fuzz {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  size_t left() const { return left_; }

  // 0 where nothing is left.
  template <class T>
  T take() {
    T value{};
    const size_t count = sizeof value < left_ ? sizeof value : left_;
    if (count > 0) memcpy(&value, data_, count);
    data_ += count;
    left_ -= count;
    return value;
  }
  int64_t between(int64_t least, int64_t most) {
    return least + take<uint16_t>() % (most - least + 1);
  }
  bool once_in(int count) { return take<uint8_t>() % count == 0; }

  // What is left in turn, again and again: a few bytes fill any array.
  void fill(void* target, size_t size) {
    auto* place = static_cast<uint8_t*>(target);
    const size_t count = left_ < 4096 ? left_ : 4096;
    for (size_t i = 0; i < size; ++i) place[i] = count == 0 ? 0x3c : data_[i % count];
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// Numbers on the heap, no byte more: AddressSanitizer sees what reaches beyond them.
template <class T>
std::unique_ptr<T[]> numbers(Bytes& from, size_t count) {
  std::unique_ptr<T[]> made(new T[count]);
  from.fill(made.get(), count * sizeof(T));
  return made;
}

}  // namespace fuzz
