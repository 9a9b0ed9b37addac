// Device access to numbers whose type is known at run time.
//
// All threads of a block read the same type, so that the choice is a branch that costs an issue
// slot or two beside a memory access, where a kernel compiled for every pair of types would have
// sixteen copies.
#pragma once

#include <type_traits>

#include "hkd/launch.cuh"
#include "hkd/storage.h"

namespace hkd {

// kCount elements of T, a power of two of bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T values[kCount];
};

// The widest type that divides a pack: what one instruction moves.
template <int kBytes>
using Word = std::conditional_t<
    kBytes % 16 == 0,
    uint4,
    std::conditional_t<
        kBytes % 8 == 0,
        uint2,
        std::conditional_t<
            kBytes % 4 == 0,
            unsigned int,
            std::conditional_t<kBytes % 2 == 0, unsigned short, unsigned char>>>>;

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* data) {
  return *reinterpret_cast<const Pack<T, kCount>*>(data);
}

// The intrinsic keeps the compiler from taking the pack apart where another branch stores elements.
template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* data, const Pack<T, kCount>& pack) {
  using W = Word<sizeof(pack)>;
  W words[sizeof(pack) / sizeof(W)];
  memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (size_t i = 0; i < sizeof(pack) / sizeof(W); ++i) {
    __stwb(reinterpret_cast<W*>(data) + i, words[i]);
  }
}

// Calls body with a pointer of the stored type.
template <typename Body>
__device__ __forceinline__ void as_stored(const Numbers& numbers, const Body& body) {
  switch (numbers.storage) {
    case Storage::kDouble:
      return body(static_cast<double*>(numbers.data));
    case Storage::kFloat:
      return body(static_cast<float*>(numbers.data));
    case Storage::kHalf:
      return body(static_cast<__half*>(numbers.data));
    default:
      return body(static_cast<__nv_bfloat16*>(numbers.data));
  }
}

template <typename Acc>
__device__ __forceinline__ Acc load(const Numbers& numbers, int64_t index) {
  Acc value{};
  as_stored(numbers, [&](const auto* data) { value = static_cast<Acc>(data[index]); });
  return value;
}

template <typename Acc>
__device__ __forceinline__ void store(const Numbers& numbers, int64_t index, Acc value) {
  as_stored(numbers, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    data[index] = static_cast<T>(value);
  });
}

// The first `count` elements at `data`, of which at most kCount are taken; a whole pack at once
// where `aligned` says that packs start at multiples of their size. What is beyond is 0.
template <typename Acc, int kCount, typename T>
__device__ __forceinline__ void load(
    const T* data, int64_t count, bool aligned, Acc (&values)[kCount]) {
  Pack<T, kCount> pack;
  if (aligned && count >= kCount) {
    pack = load_pack<T, kCount>(data);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      pack.values[k] = k < count ? data[k] : static_cast<T>(0.0f);
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = static_cast<Acc>(pack.values[k]);
  }
}

template <typename Acc, int kCount, typename T>
__device__ __forceinline__ void store(
    T* data, int64_t count, bool aligned, const Acc (&values)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    pack.values[k] = static_cast<T>(values[k]);
  }
  if (aligned && count >= kCount) {
    store_pack<T, kCount>(data, pack);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (k < count) {
        data[k] = pack.values[k];
      }
    }
  }
}

// The same of the elements from `index` on.
template <typename Acc, int kCount>
__device__ __forceinline__ void load(
    const Numbers& numbers, int64_t index, int64_t count, bool aligned, Acc (&values)[kCount]) {
  as_stored(numbers, [&](const auto* data) { load(data + index, count, aligned, values); });
}

template <typename Acc, int kCount>
__device__ __forceinline__ void store(
    const Numbers& numbers,
    int64_t index,
    int64_t count,
    bool aligned,
    const Acc (&values)[kCount]) {
  as_stored(numbers, [&](auto* data) { store(data + index, count, aligned, values); });
}

} // namespace hkd
