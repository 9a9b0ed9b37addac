// Pooling is linear and separable: rows of the map are combined into the rows of bins, then columns
// into bins. Both steps, and both steps of the gradient, are weighted sums of contiguous numbers.
//
//   NHWC: a row of the map under the box is contiguous over cells and channels.
//   NCHW: a row is contiguous over cells only. The rows of bins are combined for a few channels,
//   and
//         that small matrix is transposed to [cell][bin row and channel].
#include "roi_align/pooling.h"
#include "simd.h"

namespace hkd {
namespace {

// The columns of the map under a box. For planes they are widened to whole vectors where the map is
// wide enough; what is read besides gets no weight.
struct Window {
  int64_t first, cells;

  template <typename Acc>
  Window(const AxisWeights<Acc>& columns, int64_t width, int64_t multiple)
      : first(columns.first()), cells(columns.cells()) {
    const int64_t padded = (cells + multiple - 1) / multiple * multiple;
    if (padded <= width) {
      first = std::min(first, width - padded);
      cells = padded;
    }
  }
};

// Calls body(typed map, typed pointer to the map that is taken off or null, sign) for a map, or for
// two: once where both have one type.
template <typename Body>
void for_each_type(const StoredMap& map, const StoredMap* minus, const Body& body) {
  const bool alike = minus != nullptr && minus->type == map.type;
  const auto visit = [&](const StoredMap& visited, const StoredMap* other, int sign) {
    dispatch_floating(visited.type, "A feature map", [&](auto number) {
      using T = decltype(number);
      const T* off = other ? static_cast<const T*>(other->map.data) : nullptr;
      body(visited.as<T>(), off, sign);
    });
  };
  visit(map, alike ? minus : nullptr, 1);
  if (minus != nullptr && !alike) {
    visit(*minus, nullptr, -1);
  }
}

// Calls body with the weighted sum of rows of a map from `from` on, an element of row 0.
template <typename Acc, typename T, typename Body>
inline void with_rows(
    const FeatureMap<const T>& map,
    const T* minus,
    int sign,
    const T* from,
    Taps<Acc> taps,
    bool add,
    Acc* out,
    const Body& body) {
  const Acc factor = static_cast<Acc>(sign);
  const int64_t stride = map.row_stride();
  if (minus != nullptr) {
    const T* other = minus + (from - map.data);
    body(WeightedSum<Acc, T, true>{from, other, stride, taps, factor, add, out});
  } else {
    body(WeightedSum<Acc, T, false>{from, nullptr, stride, taps, factor, add, out});
  }
}

template <int kLanes, typename Acc>
void pool_cells(
    const BoxWeights<Acc>& box,
    const StoredMap& stored,
    const StoredMap* stored_minus,
    const Piece<Acc>& piece,
    PoolingScratch<Acc>& scratch) {
  const int64_t begin = box.columns.first(), width = box.columns.cells(), count = piece.count;
  Acc* cells = reserve(scratch.cells, width * count);
  for (int row = 0; row < piece.rows; ++row) {
    bool started = false;
    for_each_type(stored, stored_minus, [&](const auto& map, const auto* minus, int sign) {
      // Cells touch where every channel is wanted.
      const bool whole = count == map.channels;
      for (int64_t x = 0; x < (whole ? 1 : width); ++x) {
        with_rows(
            map,
            minus,
            sign,
            map.at(box.image, piece.first, 0, begin + x),
            box.rows.of_bin(row),
            started,
            cells + x * count,
            [&](const auto& sum) {
              sum.template contiguous<kLanes>(whole ? width * count : count);
            });
      }
      started = true;
    });
    for (int column = 0; column < piece.columns; ++column) {
      weighted_sum<kLanes>(
          cells - begin * count,
          count,
          box.columns.of_bin(column),
          count,
          false,
          piece.values + piece.at(row, column, 0));
    }
  }
}

template <int kLanes, typename Acc>
void pool_planes(
    const BoxWeights<Acc>& box,
    const StoredMap& stored,
    const StoredMap* stored_minus,
    const Piece<Acc>& piece,
    PoolingScratch<Acc>& scratch) {
  const Window window(box.columns, stored.map.width, kLanes);
  const int64_t width = window.cells, lanes = piece.stride;
  Acc* planes = reserve(scratch.planes, lanes * width);
  Acc* cells = reserve(scratch.cells, width * lanes);
  bool started = false;
  for_each_type(stored, stored_minus, [&](const auto& map, const auto* minus, int sign) {
    for (int row = 0; row < piece.rows; ++row) {
      with_rows(
          map,
          minus,
          sign,
          map.at(box.image, piece.first, 0, window.first),
          box.rows.of_bin(row),
          started,
          planes + row * width,
          [&](const auto& sum) {
            sum.template strided<kLanes>(
                width, piece.count, map.channel_stride(), piece.rows * width);
          });
    }
    started = true;
  });
  transpose<kLanes>(planes, width, lanes, width, cells, lanes);
  for (int column = 0; column < piece.columns; ++column) {
    weighted_sum<kLanes>(
        cells - window.first * lanes,
        lanes,
        box.columns.of_bin(column),
        lanes,
        false,
        piece.values + column * lanes);
  }
}

template <int kLanes, typename Acc>
void pool_of_layout(
    const BoxWeights<Acc>& box,
    const StoredMap& map,
    const StoredMap* minus,
    const Piece<Acc>& piece,
    PoolingScratch<Acc>& scratch) {
  if (piece.planes) {
    pool_planes<kLanes>(box, map, minus, piece, scratch);
  } else {
    pool_cells<kLanes>(box, map, minus, piece, scratch);
  }
}

} // namespace

template <typename Acc>
void pool(
    const BoxWeights<Acc>& box,
    const StoredMap& map,
    const StoredMap* minus,
    const Piece<Acc>& piece,
    PoolingScratch<Acc>& scratch) {
  with_lanes<Acc>([&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    const bool alike = minus == nullptr || minus->map.channels_last == map.map.channels_last;
    pool_of_layout<kLanes>(box, map, alike ? minus : nullptr, piece, scratch);
    if (alike) {
      return;
    }
    // The other layout is pooled by itself.
    Piece<Acc> other = piece;
    other.planes = !piece.planes;
    const int64_t step = other.planes ? kPlanes : piece.count;
    for (int64_t c = 0; c < piece.count; c += step) {
      other.first = piece.first + c;
      other.count = std::min(step, piece.count - c);
      other.stride = Piece<Acc>::packed_stride(other.planes, other.rows, other.count);
      other.values = reserve(scratch.other, other.runs() * other.stride);
      pool_of_layout<kLanes>(box, *minus, nullptr, other, scratch);
      for (int64_t row = 0; row < piece.rows; ++row) {
        for (int64_t column = 0; column < piece.columns; ++column) {
          for (int64_t i = 0; i < other.count; ++i) {
            piece.values[piece.at(row, column, c + i)] -= other.values[other.at(row, column, i)];
          }
        }
      }
    }
  });
}

template <typename Acc>
void scatter_cells(
    const BoxWeights<Acc>& box,
    const FeatureMap<Acc>& gradient,
    int begin,
    int end,
    const Acc* bins,
    PoolingScratch<Acc>& scratch) {
  const int64_t width = box.columns.bins() * gradient.channels; // of a row of bins
  Acc* row = reserve(scratch.cells, width);
  with_lanes<Acc>([&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    for (int y = std::max(begin, box.rows.first()); y < std::min(end, box.rows.end()); ++y) {
      const Taps<Acc> taps = box.rows.of_cell(y);
      if (taps.count == 0) {
        continue;
      }
      weighted_sum<kLanes>(bins, width, taps, width, false, row);
      for (int x = box.columns.first(); x < box.columns.end(); ++x) {
        weighted_sum<kLanes>(
            row,
            gradient.channels,
            box.columns.of_cell(x),
            gradient.channels,
            true,
            gradient.at(box.image, 0, y, x));
      }
    }
  });
}

template <typename Acc>
void scatter_planes(
    const BoxWeights<Acc>& box,
    const FeatureMap<Acc>& gradient,
    const Piece<Acc>& piece,
    PoolingScratch<Acc>& scratch) {
  with_lanes<Acc>([&](auto vector) {
    constexpr int kLanes = decltype(vector)::value;
    const Window window(box.columns, gradient.width, kLanes);
    const int64_t width = window.cells, lanes = piece.stride;
    Acc* planes = reserve(scratch.planes, lanes * width);
    Acc* cells = reserve(scratch.cells, width * lanes);
    for (int64_t x = 0; x < width; ++x) {
      const int cell = static_cast<int>(window.first + x);
      const bool covered = cell >= box.columns.first() && cell < box.columns.end();
      const Taps<Acc> taps = covered ? box.columns.of_cell(cell) : Taps<Acc>{nullptr, 0};
      weighted_sum<kLanes>(piece.values, lanes, taps, lanes, false, cells + x * lanes);
    }
    transpose<kLanes>(cells, lanes, width, lanes, planes, width);
    for (int y = box.rows.first(); y < box.rows.end(); ++y) {
      WeightedSum<Acc, Acc, false>{
          planes,
          nullptr,
          width,
          box.rows.of_cell(y),
          Acc(1),
          true,
          gradient.at(box.image, piece.first, y, window.first)}
          .template strided<kLanes>(
              width, piece.count, piece.rows * width, gradient.channel_stride());
    }
  });
}

template void pool(
    const BoxWeights<float>&,
    const StoredMap&,
    const StoredMap*,
    const Piece<float>&,
    PoolingScratch<float>&);
template void scatter_cells(
    const BoxWeights<float>&,
    const FeatureMap<float>&,
    int,
    int,
    const float*,
    PoolingScratch<float>&);
template void scatter_planes(
    const BoxWeights<float>&,
    const FeatureMap<float>&,
    const Piece<float>&,
    PoolingScratch<float>&);
template void pool(
    const BoxWeights<double>&,
    const StoredMap&,
    const StoredMap*,
    const Piece<double>&,
    PoolingScratch<double>&);
template void scatter_cells(
    const BoxWeights<double>&,
    const FeatureMap<double>&,
    int,
    int,
    const double*,
    PoolingScratch<double>&);
template void scatter_planes(
    const BoxWeights<double>&,
    const FeatureMap<double>&,
    const Piece<double>&,
    PoolingScratch<double>&);

} // namespace hkd
