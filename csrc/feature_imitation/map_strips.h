// Strips of feature maps in the type that losses are computed in, read from and written to maps of
// any stored type and layout on the CPU.
//
// A strip of cells is [cell][channel], a strip of a plane is cells of one channel. Where a map lies
// in memory just so, its own storage serves and nothing is copied.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <type_traits>

#include "cpu_isa.h"
#include "dispatch.h"
#include "feature_maps.h"
#include "matrix_product.h"
#include "simd.h"
#include "streaming.h"

namespace hkd {

// A feature map whose element type is known at run time. `data` is null where there is no map.
struct AnyMap {
  char* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t element = 4; // bytes
  int64_t images = 0, channels = 0, cells = 0;
  bool channels_last = false;

  AnyMap() = default;

  // `map` is one that `as_stored` has returned. Only gradients are written to, which are new.
  explicit AnyMap(const torch::stable::Tensor& map)
      : data(static_cast<char*>(const_cast<void*>(map.const_data_ptr()))),
        type(map.scalar_type()),
        element(map.element_size()),
        images(map.size(0)),
        channels(map.size(1)),
        cells(map.size(2) * map.size(3)),
        channels_last(!map.is_contiguous()) {
  }

  char* cell(int64_t image, int64_t cell) const { // of a channels_last map
    return data + (image * cells + cell) * channels * element;
  }
  char* plane(int64_t image, int64_t channel, int64_t cell) const { // of any other
    return data + ((image * channels + channel) * cells + cell) * element;
  }
};

template <typename To, typename From>
inline void convert(To* to, const From* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

template <typename Acc>
HKD_NOINLINE void load_numbers(Acc* to, const char* from, ScalarType type, int64_t count) {
  dispatch_floating(type, "A tensor", [&](auto t) {
    using T = decltype(t);
    with_best_isa([&](auto) { convert(to, reinterpret_cast<const T*>(from), count); });
  });
}

// Calls body(first channel, channels, first cell, cells, tile) for small parts of a strip; `tile`
// is room for their (channels, cells) numbers, rows of which are kTileCells apart.
constexpr int64_t kTileChannels = 16, kTileCells = 256;

template <typename Acc, typename Body>
inline void for_each_tile(int64_t channels, int64_t cells, const Body& body) {
  Acc tile[kTileChannels * kTileCells];
  for (int64_t c = 0; c < channels; c += kTileChannels) {
    for (int64_t i = 0; i < cells; i += kTileCells) {
      body(c, std::min(kTileChannels, channels - c), i, std::min(kTileCells, cells - i), tile);
    }
  }
}

template <typename Acc>
HKD_NOINLINE void load_cells(
    Acc* to, const AnyMap& map, int64_t image, int64_t first, int64_t count) {
  if (map.channels_last) {
    return load_numbers(to, map.cell(image, first), map.type, count * map.channels);
  }
  dispatch_floating(map.type, "A map", [&](auto t) {
    using T = decltype(t);
    const T* from = reinterpret_cast<const T*>(map.plane(image, 0, first));
    with_lanes<Acc>([&](auto lanes) {
      if constexpr (std::is_same_v<T, Acc>) {
        transpose<lanes()>(from, map.cells, map.channels, count, to, map.channels);
      } else {
        for_each_tile<Acc>(
            map.channels, count, [&](int64_t c, int64_t channels, int64_t i, int64_t n, Acc* tile) {
              for (int64_t k = 0; k < channels; ++k) {
                convert(tile + k * kTileCells, from + (c + k) * map.cells + i, n);
              }
              transpose<lanes()>(
                  tile, kTileCells, channels, n, to + i * map.channels + c, map.channels);
            });
      }
    });
  });
}

// The strip itself where it is stored so, else a copy in `buffer`.
template <typename Acc>
inline const Acc* read_cells(
    const AnyMap& map, int64_t image, int64_t first, int64_t count, Acc* buffer) {
  if (map.channels_last && map.type == scalar_type_of<Acc>()) {
    return reinterpret_cast<const Acc*>(map.cell(image, first));
  }
  load_cells(buffer, map, image, first, count);
  return buffer;
}

template <typename Acc>
inline const Acc* read_plane(
    const AnyMap& map, int64_t image, int64_t channel, int64_t first, int64_t count, Acc* buffer) {
  const char* from = map.plane(image, channel, first);
  if (map.type == scalar_type_of<Acc>()) {
    return reinterpret_cast<const Acc*>(from);
  }
  load_numbers(buffer, from, map.type, count);
  return buffer;
}

// Where the gradient of a map goes.
struct GradientMap {
  AnyMap map;
  bool streamed; // past the caches

  // `bytes` of `from`, or zeros where it is null.
  void copy(char* to, const char* from, int64_t bytes) const {
    if (streamed) {
      stream(to, from, bytes);
    } else if (from) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }

  // Where the loss has no gradient.
  void fill(char* to, int64_t bytes) const {
    copy(to, nullptr, bytes);
  }

  void fill_cells(int64_t image, int64_t first, int64_t last) const {
    if (map.channels_last) {
      return fill(map.cell(image, first), (last - first) * map.channels * map.element);
    }
    for (int64_t c = 0; c < map.channels; ++c) {
      fill(map.plane(image, c, first), (last - first) * map.element);
    }
  }

  template <typename Acc>
  void store(char* to, const Acc* numbers, int64_t count) const {
    if (map.type != scalar_type_of<Acc>()) {
      return store_converted(to, numbers, count);
    }
    copy(to, reinterpret_cast<const char*>(numbers), count * sizeof(Acc));
  }

  template <typename Acc>
  void store_cells(int64_t image, int64_t first, int64_t count, const Acc* rows) const {
    if (map.channels_last) {
      store(map.cell(image, first), rows, count * map.channels);
    } else {
      store_transposed(image, first, count, rows);
    }
  }

 private:
  template <typename Acc>
  HKD_NOINLINE void store_converted(char* to, const Acc* numbers, int64_t count) const {
    dispatch_floating(map.type, "A map", [&](auto t) {
      using T = decltype(t);
      with_best_isa([&](auto) {
        constexpr int64_t kBlock = 512;
        T block[kBlock];
        for (int64_t i = 0; i < count; i += kBlock) {
          const int64_t size = std::min(kBlock, count - i);
          convert(block, numbers + i, size);
          copy(to + i * sizeof(T), reinterpret_cast<const char*>(block), size * sizeof(T));
        }
      });
    });
  }

  template <typename Acc>
  HKD_NOINLINE void store_transposed(
      int64_t image, int64_t first, int64_t count, const Acc* rows) const {
    for_each_tile<Acc>(
        map.channels, count, [&](int64_t c, int64_t channels, int64_t i, int64_t n, Acc* tile) {
          with_lanes<Acc>([&](auto lanes) {
            transpose<lanes()>(
                rows + i * map.channels + c, map.channels, n, channels, tile, kTileCells);
          });
          for (int64_t k = 0; k < channels; ++k) {
            store(map.plane(image, c + k, first + i), tile + k * kTileCells, n);
          }
        });
  }
};

} // namespace hkd
