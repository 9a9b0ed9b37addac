// What the kernels of feature imitation share on the device.
#pragma once

#include "feature_imitation/imitation_kernels.h"
#include "hkd/reduce.cuh"
#include "hkd/storage.cuh"

namespace hkd {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSide = 4; // of the square of cells and channels that a thread has in registers
constexpr unsigned kAllCells = (1u << kSide) - 1;

// Blocks that a multiprocessor is to run at once: the registers that a thread gets without
// spilling.
template <typename Acc>
constexpr int kBlocksAtOnce = sizeof(Acc) == sizeof(double) ? 1 : 2;

// Level l has the blocks first[l] to first[l + 1] - 1 of a launch.
struct BlocksOfLevels {
  int32_t first[kMaxLevels + 1];
  int32_t levels;

  int64_t total() const {
    return first[levels];
  }

  __device__ __forceinline__ int level(int32_t block) const {
    int l = levels - 1;
    while (block < first[l]) {
      --l;
    }
    return l;
  }
};

template <typename Levels, typename Count>
BlocksOfLevels blocks_of_levels(const Levels& table, const Count& count) {
  BlocksOfLevels blocks{};
  blocks.levels = table.count;
  for (int l = 0; l < table.count; ++l) {
    blocks.first[l + 1] = blocks.first[l] + static_cast<int32_t>(count(table.levels[l]));
  }
  return blocks;
}

inline int64_t divided_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// Calls body(Acc{}).
template <typename Body>
void dispatch_loss_type(bool is_double, const Body& body) {
  is_double ? body(double{}) : body(float{});
}

// ----------------------------------------------------------------------------------- distances
// kMse to kSmoothL1, chosen at run time.
template <typename Acc>
__device__ __forceinline__ Acc distance_of(Distance distance, Acc difference) {
  Acc result;
  if (distance == Distance::kMse) {
    element_distance<Distance::kMse>(difference, result);
  } else if (distance == Distance::kL1) {
    element_distance<Distance::kL1>(difference, result);
  } else {
    element_distance<Distance::kSmoothL1>(difference, result);
  }
  return result;
}

template <typename Acc>
__device__ __forceinline__ Acc slope_of(Distance distance, Acc difference) {
  return distance == Distance::kMse  ? element_slope<Distance::kMse>(difference)
         : distance == Distance::kL1 ? element_slope<Distance::kL1>(difference)
                                     : element_slope<Distance::kSmoothL1>(difference);
}

// The weights or factors of neighbouring cells; 0 beyond the map, 1 where there are none.
template <typename Acc>
__device__ __forceinline__ void load_cells(
    const void* numbers, int64_t first, int64_t count, bool aligned, Acc (&values)[kSide]) {
  if (numbers != nullptr) {
    return load(static_cast<const Acc*>(numbers) + first, count, aligned, values);
  }
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    values[i] = i < count ? Acc(1) : Acc(0);
  }
}

// The weights of neighbouring channels of an image; 0 beyond the last.
template <typename Acc>
__device__ __forceinline__ void load_channel_weights(
    const ImitationLevel& level, int64_t image, int64_t channel, Acc (&values)[kSide]) {
  const int64_t channels = level.teacher.channels;
  if (level.channel_weights.data != nullptr) {
    return load(
        level.channel_weights, image * channels + channel, channels - channel, false, values);
  }
#pragma unroll
  for (int k = 0; k < kSide; ++k) {
    values[k] = channel + k < channels ? Acc(1) : Acc(0);
  }
}

// What gradients of neighbouring channels depend on beside the numbers and their cell: the weights
// of the channels in the first row, or of kPkd the means and factors of student and teacher.
template <typename Acc>
struct ChannelFactors {
  Acc rows[4][kSide];

  __device__ __forceinline__
  ChannelFactors(const ImitationLevel& level, Distance distance, int64_t image, int64_t channel)
      : rows{} {
    if (distance == Distance::kPkd) {
      const int64_t channels = level.teacher.channels;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Acc* row = static_cast<const Acc*>(level.coefficients) + r * channels;
        load(row + channel, channels - channel, channels % kSide == 0, rows[r]);
      }
    } else {
      load_channel_weights(level, image, channel, rows[0]);
    }
  }
};

// The gradient of the sum over a level with respect to s, where `cell` is the weight of its cell;
// of kCosine its factor, and `cell_of_teacher` that of t.
template <typename Acc>
__device__ __forceinline__ Acc gradient_of(
    Distance distance,
    Acc s,
    Acc t,
    Acc cell,
    Acc cell_of_teacher,
    const ChannelFactors<Acc>& channels,
    int k) {
  if (distance == Distance::kCosine) {
    const Acc sum = cell * s + cell_of_teacher * t;
    return cell != 0 || cell_of_teacher != 0 ? sum : Acc(0);
  }
  if (distance == Distance::kPkd) {
    return channels.rows[2][k] * (s - channels.rows[0][k]) +
           channels.rows[3][k] * (t - channels.rows[1][k]);
  }
  const Acc weight = cell * channels.rows[0][k];
  return cell != 0 && channels.rows[0][k] != 0 ? weight * slope_of(distance, s - t) : Acc(0);
}

// --------------------------------------------------------------------------------------- moments
// Moments of what exceeds a pivot. The pivot is a number of the channel, one of few, so that a
// large mean does not cancel and an outlier spoils none but its own.
template <typename Acc>
struct PartialMoments {
  Acc s_pivot, t_pivot;
  Moments<Acc> moments;

  __device__ __forceinline__ void merge(PartialMoments other) {
    if (moments.count == 0) {
      *this = other;
      return;
    }
    other.moments.s_mean += other.s_pivot - s_pivot;
    other.moments.t_mean += other.t_pivot - t_pivot;
    moments.merge(other.moments);
  }

  // What the lane has whose number differs in `bits`.
  __device__ __forceinline__ PartialMoments of_lane(int bits) const {
    return {
        __shfl_xor_sync(kAllLanes, s_pivot, bits),
        __shfl_xor_sync(kAllLanes, t_pivot, bits),
        {__shfl_xor_sync(kAllLanes, moments.count, bits),
         __shfl_xor_sync(kAllLanes, moments.s_mean, bits),
         __shfl_xor_sync(kAllLanes, moments.t_mean, bits),
         __shfl_xor_sync(kAllLanes, moments.ss, bits),
         __shfl_xor_sync(kAllLanes, moments.tt, bits),
         __shfl_xor_sync(kAllLanes, moments.st, bits)}};
  }
};

static_assert(sizeof(PartialMoments<float>) == kNumbersOfMoments * sizeof(float));

// Sums of what cells of four neighbouring channels exceed the first of them by.
template <typename Acc>
struct MomentSums {
  Acc s_pivot[kSide], t_pivot[kSide], s[kSide], t[kSide], ss[kSide], tt[kSide], st[kSide];
  int32_t count;

  __device__ __forceinline__ MomentSums() : s{}, t{}, ss{}, tt{}, st{}, count(0) {
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      s_pivot[k] = t_pivot[k] = 0;
    }
  }

  // Adds the first `cells` rows.
  __device__ __forceinline__ void add(
      const Acc (&student)[kSide][kSide], const Acc (&teacher)[kSide][kSide], int64_t cells) {
    if (count == 0) {
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        s_pivot[k] = student[0][k];
        t_pivot[k] = teacher[0][k];
      }
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      if (i < cells) {
        ++count;
#pragma unroll
        for (int k = 0; k < kSide; ++k) {
          const Acc ds = student[i][k] - s_pivot[k], dt = teacher[i][k] - t_pivot[k];
          s[k] += ds;
          t[k] += dt;
          ss[k] += ds * ds;
          tt[k] += dt * dt;
          st[k] += ds * dt;
        }
      }
    }
  }

  __device__ __forceinline__ PartialMoments<Acc> of_channel(int k) const {
    const Acc n = static_cast<Acc>(count), share = count > 0 ? 1 / n : Acc(0);
    const Acc s_mean = s[k] * share, t_mean = t[k] * share;
    const Acc own_ss = ss[k] - s_mean * s[k], own_tt = tt[k] - t_mean * t[k];
    return {
        s_pivot[k],
        t_pivot[k],
        {n,
         s_mean,
         t_mean,
         own_ss < 0 ? Acc(0) : own_ss,
         own_tt < 0 ? Acc(0) : own_tt,
         st[k] - s_mean * t[k]}};
  }
};

} // namespace hkd
