// The samples of one axis of RoIAlign merged into weights: a small sparse matrix (bins x cells).
//
// Neighbouring samples share cells, so merging halves the work of the channels, each of which uses
// the same matrix. Host only; needs no torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hkd/roi_sampling.h"

namespace hkd {

// An entry of a sparse row: a column and its weight.
template <typename Acc>
struct Tap {
  int index;
  Acc weight;
};

template <typename Acc>
struct Taps {
  const Tap<Acc>* first;
  int count;
};

template <typename Acc>
class AxisWeights {
 public:
  // A bin is the mean of its samples. Memory of earlier boxes is used again. To be compiled for the
  // baseline: fused multiply-adds would move samples across the border of the map on some machines.
  void build(const AxisSamples<Acc>& samples, int bins, int length) {
    bins_ = bins;
    taps_.clear();
    bin_ends_.clear();
    for (int bin = 0; bin < bins; ++bin) {
      const std::size_t begin = taps_.size();
      if (samples.grid > 0) {
        add_bin(samples, bin, length);
      }
      for (std::size_t i = begin; i < taps_.size(); ++i) {
        taps_[i].weight /= samples.grid;
      }
      bin_ends_.push_back(static_cast<int>(taps_.size()));
    }
    first_ = taps_.empty() ? 0 : length;
    end_ = 0;
    for (const auto& tap : taps_) {
      first_ = std::min(first_, tap.index);
      end_ = std::max(end_, tap.index + 1);
    }
  }

  // The same matrix by cells, for gradients; after build().
  void transpose() {
    cell_ends_.assign(cells() + 1, 0);
    for (const auto& tap : taps_) {
      ++cell_ends_[tap.index - first_ + 1];
    }
    for (int i = 0; i < cells(); ++i) {
      cell_ends_[i + 1] += cell_ends_[i];
    }
    // cell_ends_[i] is now where cell i begins; filling moves it to where cell i ends.
    transposed_.resize(taps_.size());
    for (int bin = 0; bin < bins_; ++bin) {
      const Taps<Acc> taps = of_bin(bin);
      for (int i = 0; i < taps.count; ++i) {
        transposed_[cell_ends_[taps.first[i].index - first_]++] = {bin, taps.first[i].weight};
      }
    }
  }

  int bins() const {
    return bins_;
  }

  // The cells that are read: [first(), end()), with gaps where samples are far apart.
  int first() const {
    return first_;
  }
  int end() const {
    return end_;
  }
  int cells() const {
    return end_ - first_;
  }

  // Cells of a bin, rising, no cell twice.
  Taps<Acc> of_bin(int bin) const {
    const int begin = bin == 0 ? 0 : bin_ends_[bin - 1];
    return {taps_.data() + begin, bin_ends_[bin] - begin};
  }
  // Bins of a cell in [first(), end()).
  Taps<Acc> of_cell(int cell) const {
    const int i = cell - first_, begin = i == 0 ? 0 : cell_ends_[i - 1];
    return {transposed_.data() + begin, cell_ends_[i] - begin};
  }

 private:
  void add_bin(const AxisSamples<Acc>& samples, int bin, int length) {
    // Samples run upwards or, in a box whose sides are swapped, downwards; they are added upwards.
    const bool down = samples.bin < 0;
    double begin = 0, end = static_cast<double>(samples.grid);
    const double step = static_cast<double>(samples.bin) / end;
    if (step != 0 && end > 64) {
      // Only these can be inside [-1, length]; the rest of a giant box costs nothing.
      const double origin = static_cast<double>(samples.start) + bin * double(samples.bin);
      const double a = (-1 - origin) / step - 0.5, b = (length - origin) / step - 0.5;
      begin = std::max(begin, std::floor(std::min(a, b)) - 2);
      end = std::min(end, std::ceil(std::max(a, b)) + 3);
      // Where Acc cannot tell neighbouring samples apart any more.
      end = std::min(end, begin + 2.0 * length + std::abs((length + 1) / step) + 64);
    }
    for (double i = begin; i < end; ++i) {
      const double sample = down ? begin + (end - 1 - i) : i;
      Bilinear<Acc> taps;
      if (bilinear(samples.position(bin, static_cast<Acc>(sample)), length, &taps)) {
        add(bin, taps.low, taps.low_weight);
        add(bin, taps.high, taps.high_weight);
      }
    }
  }

  // A rising sample starts at the last cell, at the one before, or beyond.
  void add(int bin, int cell, Acc weight) {
    if (weight == 0) {
      return;
    }
    const std::size_t begin = bin == 0 ? 0 : bin_ends_[bin - 1];
    for (std::size_t i = taps_.size(); i > begin && i + 2 > taps_.size(); --i) {
      if (taps_[i - 1].index == cell) {
        taps_[i - 1].weight += weight;
        return;
      }
    }
    taps_.push_back({cell, weight});
  }

  int bins_ = 0, first_ = 0, end_ = 0;
  std::vector<Tap<Acc>> taps_, transposed_;
  std::vector<int> bin_ends_, cell_ends_;
};

} // namespace hkd
