// Memory that begins where a cache line does.
#pragma once

#include <cstdlib>
#include <memory>

#include "arithmetic.hpp"

namespace crdt_llm {

constexpr size_t CACHE_LINE = 64;

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Freed>;

// Uninitialised. Where there is none the process ends: nothing is in it that cannot be derived
// again.
template <typename T>
Buffer<T> allocate(size_t count) {
  const size_t bytes = (count * sizeof(T) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
  void* memory = std::aligned_alloc(CACHE_LINE, std::max(bytes, CACHE_LINE));
  if (memory == nullptr) std::abort();
  return Buffer<T>(static_cast<T*>(memory));
}

}  // namespace crdt_llm
