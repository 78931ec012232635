// Memory of one call, uninitialised, on whole cache lines; false where there is none.
#pragma once
#include <stdint.h>

#include <cstdlib>
#include <memory>

namespace directclr {

constexpr const char* kNoMemory = "out of memory for the scratch of the loss";

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64 + 64))) {}
  explicit operator bool() const { return data_ != nullptr; }
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T, Free> data_;
};

}  // namespace directclr
