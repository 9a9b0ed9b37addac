// The work of one call of feature imitation on the CPU, over all levels and images.
//
// It is cut into chunks of cells whose size depends on the shapes alone. Threads take them as they
// become free; the sums of chunks are added in order, so the result does not depend on the number
// of threads. A chunk knows its runs of active cells, and only these are read.
//
// There are two roads through a chunk. "Cells" takes [cell][channel] strips: channels_last maps as
// they lie, others transposed strip by strip (mixed layouts, adapters). "Planes" takes NCHW
// maps channel by channel as they lie; its runs are rounded out to whole cache lines.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "feature_imitation/map_strips.h"
#include "feature_imitation/strip_distances.h"
#include "matrix_product.h"
#include "parallel.h"

namespace hkd {

// One level. Optional members are null or -1.
template <typename Acc>
struct ImitationLevel {
  AnyMap student, teacher;
  GradientMap gradient;                 // backward
  const Acc* cell_weights = nullptr;    // (N, cells); null where all are 1
  const Acc* channel_weights = nullptr; // (N, C_t)
  // What backward would else read the maps twice for; forward fills them. kCosine: (2, N, cells),
  // factors of student and teacher in a cell. kPkd: (4, C_t), means of student and teacher and
  // factors of what exceeds them.
  Acc* coefficients = nullptr;
  int weight = -1, bias = -1; // places of the 1x1 adapter in Imitation
  double scale = 0;           // of the sum over the level, in the loss or in the gradient

  bool adapted() const {
    return weight >= 0;
  }
};

// The weight (C_t, C_s) or bias (C_t,) of an adapter, which levels may share.
template <typename Acc>
struct AdapterPart {
  std::vector<Acc> values;
  std::vector<double> gradient; // backward; zeros at first
};

template <typename Acc>
class Imitation {
 public:
  std::vector<ImitationLevel<Acc>> levels;
  std::vector<AdapterPart<Acc>> weights, biases;

  explicit Imitation(Distance distance) : distance_(distance) {
  }

  // The loss. Fills the levels' coefficients.
  double forward() {
    plan(/*backward=*/false);
    std::vector<double> sums(tasks_.size());
    std::vector<std::vector<double>> moments(distance_ == Distance::kPkd ? chunks_.size() : 0);
    for (size_t i = 0; i < moments.size(); ++i) {
      moments[i].resize(5 * level_of(chunks_[i]).teacher.channels);
    }
    run(0, tasks_.size(), [&](auto lanes, auto kind, int64_t task, Scratch& scratch) {
      const int64_t chunk = tasks_[task].chunk;
      double* sums_of_chunk = moments.empty() ? nullptr : moments[chunk].data();
      sums[task] = on_planes(level_of(chunks_[chunk]))
                       ? planes_forward<lanes(), kind()>(tasks_[task], scratch, sums_of_chunk)
                       : cells_forward<lanes(), kind()>(chunks_[chunk], scratch, sums_of_chunk);
    });
    std::vector<double> level_sums(levels.size());
    for (size_t task = 0; task < tasks_.size(); ++task) {
      level_sums[chunks_[tasks_[task].chunk].level] += sums[task];
    }
    if (distance_ == Distance::kPkd) {
      correlate(moments, level_sums);
    }
    double loss = 0;
    for (size_t i = 0; i < levels.size(); ++i) {
      loss += levels[i].scale * level_sums[i];
    }
    return loss;
  }

  // Fills the gradients of the levels and of the adapters.
  void backward() {
    plan(/*backward=*/true);
    // A chunk keeps a gradient of its adapter, so levels with one are done one after the other.
    for (size_t first = 0, last = 0; first < tasks_.size(); first = last) {
      const int level = chunks_[tasks_[first].chunk].level;
      while (last < tasks_.size() &&
             (weights.empty() || chunks_[tasks_[last].chunk].level == level)) {
        ++last;
      }
      backward(levels[level], first, last);
    }
  }

 private:
  // Neighbouring cells of an image, counted from the first of the map.
  struct Run {
    int64_t first, count;
  };

  struct Chunk {
    int level;
    int64_t image, first, last; // cells
    std::vector<Run> runs;      // the active cells
  };

  // A chunk and the channels of it that are done at once; those of "cells" are all.
  struct Task {
    int64_t chunk, first_channel, last_channel;
  };

  // Cells that are read into one strip: a part of a run, or for an adapter the parts of several.
  struct Batch {
    const Run* runs;
    int64_t count, cells;
  };

  // Memory of a thread.
  struct Scratch {
    std::unique_ptr<Acc[]> student, teacher, adapted, product, sums;
    std::vector<Run> runs;
    std::vector<double> totals;
  };

  static constexpr int64_t kTaskNumbers = 1 << 17; // of one side; enough to be worth a turn
  static constexpr int64_t kStripNumbers = 4096;   // stays in the first-level cache
  static constexpr int64_t kStoredNumbers = 128;   // few, so that reads and stores overlap
  static constexpr int64_t kLineCells = 16;        // of a float plane in a cache line
  static constexpr int kPlanes = 8;                // whose short runs are read side by side
  static constexpr int64_t kMomentCells = 64;
  static constexpr int64_t kPivotCells = 512;
  static constexpr int64_t kCosineCells = 1024;
  static constexpr int64_t kProducts = 16;      // summed in Acc
  static constexpr int64_t kAdapterCells = 256; // a GEMM of this height is efficient
  static constexpr int64_t kAdapterChunks = 8;  // gradients of an adapter that are kept

  Distance distance_;
  std::vector<Chunk> chunks_;
  std::vector<Task> tasks_;

  const ImitationLevel<Acc>& level_of(const Chunk& chunk) const {
    return levels[chunk.level];
  }

  bool on_planes(const ImitationLevel<Acc>& level) const {
    return !level.adapted() && !level.student.channels_last && !level.teacher.channels_last;
  }

  // Memory is slow to answer for a short run, so masked planes are done side by side.
  static int64_t planes_of(const ImitationLevel<Acc>& level) {
    return level.cell_weights ? kPlanes : 1;
  }

  int64_t cells_of_strip(const ImitationLevel<Acc>& level) const {
    if (level.adapted()) {
      return kAdapterCells;
    }
    const int64_t cells = kStripNumbers / std::max<int64_t>(level.teacher.channels, 1);
    return std::max(cells, distance_ == Distance::kPkd ? kMomentCells : kLineCells);
  }

  // ------------------------------------------------------------------------------------- planning
  static int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
  }

  void plan(bool backward) {
    for (size_t l = 0; l < levels.size(); ++l) {
      const ImitationLevel<Acc>& level = levels[l];
      const int64_t cells = level.student.cells;
      const int64_t channels = std::max(level.student.channels, level.teacher.channels);
      int64_t size = std::max<int64_t>(cells, 1), channels_of_task = channels;
      if (on_planes(level) && distance_ == Distance::kCosine && !backward) {
        size = std::min(size, kCosineCells); // of all channels
      } else if (on_planes(level)) {
        size = std::min(size, kTaskNumbers / planes_of(level));
        channels_of_task = std::max<int64_t>(kTaskNumbers / size, 1);
      } else if (level.adapted() && backward) {
        const int64_t share = level.student.images * cells / kAdapterChunks;
        size = std::max(round_up(share, kAdapterCells), 4 * kAdapterCells);
      } else {
        // The moments of a chunk take memory, so these chunks are larger.
        const int64_t numbers = kTaskNumbers * (distance_ == Distance::kPkd ? 4 : 1);
        size =
            round_up(std::max<int64_t>(numbers / std::max<int64_t>(channels, 1), 1), kMomentCells);
      }
      for (int64_t image = 0; image < level.student.images; ++image) {
        for (int64_t first = 0; first < cells; first += size) {
          for (int64_t c = 0; c < channels; c += channels_of_task) {
            const int64_t chunk = chunks_.size();
            tasks_.push_back({chunk, c, std::min(c + channels_of_task, channels)});
          }
          chunks_.push_back({static_cast<int>(l), image, first, std::min(first + size, cells), {}});
        }
      }
    }
    for_each_worker(chunks_.size(), [&](int64_t, const auto& next) {
      for (int64_t chunk = next(); chunk >= 0; chunk = next()) {
        with_best_isa([&](auto) { find_runs(chunks_[chunk], backward); });
      }
    });
  }

  void find_runs(Chunk& chunk, bool backward) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const int64_t image = chunk.image * level.student.cells;
    const Acc* weights = level.cell_weights ? level.cell_weights + image : nullptr;
    const Acc* others = nullptr;
    if (distance_ == Distance::kCosine && backward) {
      weights = level.coefficients + image;
      others = weights + level.student.images * level.student.cells;
    }
    if (level.teacher.channels == 0) {
      return;
    }
    if (weights == nullptr) {
      chunk.runs.push_back({chunk.first, chunk.last - chunk.first});
      return;
    }
    const bool lines = on_planes(level);
    const auto add = [&](int64_t first, int64_t count) {
      if (!chunk.runs.empty() && chunk.runs.back().first + chunk.runs.back().count == first) {
        chunk.runs.back().count += count;
      } else {
        chunk.runs.push_back({first, count});
      }
    };
    const auto counts = [&](int64_t cell) {
      return weights[cell] != 0 || (others && others[cell] != 0);
    };
    for (int64_t first = chunk.first; first < chunk.last; first += kLineCells) {
      const int64_t count = std::min(kLineCells, chunk.last - first);
      bool any = false;
      for (int64_t i = 0; i < count; ++i) {
        any |= counts(first + i);
      }
      if (any && lines) {
        add(first, count);
      }
      for (int64_t i = 0; any && !lines && i < count; ++i) {
        if (counts(first + i)) {
          add(first + i, 1);
        }
      }
    }
  }

  // Double is for checking gradients: not worth three instruction sets.
  template <typename Body>
  static void for_machine(const Body& body) {
    if constexpr (std::is_same_v<Acc, float>) {
      with_best_isa(body);
    } else {
      body(std::integral_constant<int, 4>{});
    }
  }

  // Calls body(lanes, kind, task, scratch) for tasks first to last - 1, compiled for the machine.
  template <typename Body>
  void run(int64_t first, int64_t last, const Body& body) {
    int64_t strip = 1, product = 1, sums = 1;
    bool adapted = false;
    for (const ImitationLevel<Acc>& level : levels) {
      const int64_t channels = std::max(level.student.channels, level.teacher.channels);
      strip = std::max({strip, kStripNumbers, cells_of_strip(level) * channels});
      sums = std::max({sums, 5 * channels, 3 * kCosineCells});
      if (level.adapted()) {
        adapted = true;
        product = std::max(product, level.student.channels * level.teacher.channels);
      }
    }
    // At least two units, or a single one would leave the pool to the GEMM.
    for_each_worker(std::max<int64_t>(last - first, 2), [&](int64_t, const auto& next) {
      Scratch scratch;
      scratch.student.reset(new Acc[strip]);
      scratch.teacher.reset(new Acc[strip]);
      scratch.adapted.reset(new Acc[strip]);
      scratch.product.reset(new Acc[adapted ? product : 1]);
      scratch.sums.reset(new Acc[sums]);
      for (int64_t unit = next(); unit >= 0; unit = next()) {
        const int64_t task = first + unit;
        if (task < last) {
          for_machine([&](auto lanes) {
            switch (distance_) {
              case Distance::kMse:
                return body(lanes, constant<Distance::kMse>(), task, scratch);
              case Distance::kL1:
                return body(lanes, constant<Distance::kL1>(), task, scratch);
              case Distance::kSmoothL1:
                return body(lanes, constant<Distance::kSmoothL1>(), task, scratch);
              case Distance::kCosine:
                return body(lanes, constant<Distance::kCosine>(), task, scratch);
              case Distance::kPkd:
                return body(lanes, constant<Distance::kPkd>(), task, scratch);
            }
          });
        }
      }
      stream_fence();
    });
  }

  template <Distance kind>
  using constant = std::integral_constant<Distance, kind>;

  // --------------------------------------------------------------------------------- road of cells
  // Calls body(batch) for the runs of a chunk.
  template <typename Body>
  void for_each_batch(const Chunk& chunk, Scratch& scratch, const Body& body) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const int64_t limit = cells_of_strip(level);
    size_t run = 0;
    int64_t done = 0; // cells of the run
    while (run < chunk.runs.size()) {
      scratch.runs.clear();
      int64_t cells = 0;
      do {
        const Run& whole = chunk.runs[run];
        const int64_t count = std::min(limit - cells, whole.count - done);
        scratch.runs.push_back({whole.first + done, count});
        cells += count;
        done += count;
        if (done == whole.count) {
          ++run;
          done = 0;
        }
      } while (level.adapted() && cells < limit && run < chunk.runs.size());
      body(Batch{scratch.runs.data(), static_cast<int64_t>(scratch.runs.size()), cells});
    }
  }

  static const Acc* read(const AnyMap& map, int64_t image, const Batch& batch, Acc* buffer) {
    if (batch.count == 1) {
      return read_cells(map, image, batch.runs[0].first, batch.cells, buffer);
    }
    Acc* to = buffer;
    for (int64_t i = 0; i < batch.count; ++i) {
      load_cells(to, map, image, batch.runs[i].first, batch.runs[i].count);
      to += batch.runs[i].count * map.channels;
    }
    return buffer;
  }

  // (cells, C_t) = student (cells, C_s) weight^T + bias
  HKD_NOINLINE void adapt(
      const ImitationLevel<Acc>& level, const Acc* student, int64_t cells, Acc* out) const {
    const int64_t channels = level.teacher.channels;
    const Acc* weight = weights[level.weight].values.data();
    multiply(out, student, false, weight, true, cells, channels, level.student.channels);
    if (level.bias >= 0) {
      const Acc* bias = biases[level.bias].values.data();
      for (int64_t i = 0; i < cells; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          out[i * channels + c] += bias[c];
        }
      }
    }
  }

  // Calls body(first, count, weight) for neighbouring cells of one weight.
  template <typename Body>
  static void for_each_weight(
      const Acc* cell_weights, bool one_by_one, int64_t cells, const Body& body) {
    for (int64_t i = 0, j; i < cells; i = j) {
      const Acc weight = cell_weights ? cell_weights[i] : Acc(1);
      j = cell_weights || one_by_one ? i + 1 : cells;
      while (cell_weights && !one_by_one && j < cells && cell_weights[j] == weight) {
        ++j;
      }
      body(i, j - i, weight);
    }
  }

  void clear_cosines(const Chunk& chunk) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const int64_t cells = level.student.cells;
    for (int64_t image : {chunk.image, level.student.images + chunk.image}) {
      Acc* factors = level.coefficients + image * cells;
      std::fill(factors + chunk.first, factors + chunk.last, Acc(0));
    }
  }

  // Sets the factors of a cell, counted over the images, and returns its weighted distance.
  static double put_cosine(
      const ImitationLevel<Acc>& level, int64_t cell, Acc weight, double st, double ss, double tt) {
    const CosineCell<double> cosine = cosine_cell(st, ss, tt);
    Acc* factors = level.coefficients + cell;
    factors[0] = static_cast<Acc>(weight * cosine.student);
    factors[level.student.images * level.student.cells] = static_cast<Acc>(weight * cosine.teacher);
    return weight * cosine.distance;
  }

  template <int kLanes, Distance kind>
  double cells_forward(const Chunk& chunk, Scratch& scratch, double* moments) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const int64_t channels = level.teacher.channels, cells = level.student.cells;
    const int64_t image = chunk.image * cells;
    const Acc* channel_weights =
        level.channel_weights ? level.channel_weights + chunk.image * channels : nullptr;
    if (kind == Distance::kCosine) {
      clear_cosines(chunk);
    }
    double sum = 0, counted = 0;
    for_each_batch(chunk, scratch, [&](const Batch& batch) {
      const Acc* s = read(level.student, chunk.image, batch, scratch.student.get());
      const Acc* t = read(level.teacher, chunk.image, batch, scratch.teacher.get());
      if (level.adapted()) {
        adapt(level, s, batch.cells, scratch.adapted.get());
        s = scratch.adapted.get();
      }
      for (int64_t i = 0; i < batch.count; ++i) {
        const Run& run = batch.runs[i];
        const Acc* w = level.cell_weights ? level.cell_weights + image + run.first : nullptr;
        if constexpr (kind == Distance::kCosine) {
          for (int64_t j = 0; j < run.count; ++j) {
            Acc st, ss, tt;
            products<kLanes>(s + j * channels, t + j * channels, channels, st, ss, tt);
            sum += put_cosine(level, image + run.first + j, w ? w[j] : Acc(1), st, ss, tt);
          }
        } else if constexpr (kind == Distance::kPkd) {
          for (int64_t j = 0; j < run.count; j += kMomentCells) {
            const int64_t count = std::min(kMomentCells, run.count - j);
            add_moments_of_cells(
                s + j * channels,
                t + j * channels,
                count,
                channels,
                scratch.sums.get(),
                moments,
                counted);
            counted += count;
          }
        } else {
          for_each_weight(
              w, channel_weights, run.count, [&](int64_t first, int64_t count, Acc weight) {
                const Acc* a = s + first * channels;
                const Acc* b = t + first * channels;
                sum += static_cast<double>(weight) *
                       (channel_weights
                            ? sum_distances<kind, true, kLanes>(a, b, channel_weights, channels)
                            : sum_distances<kind, false, kLanes>(
                                  a, b, channel_weights, count * channels));
              });
        }
        s += run.count * channels;
        t += run.count * channels;
      }
    });
    return sum;
  }

  // Gradients of the adapter from the cells of a chunk.
  struct AdapterGradient {
    std::vector<Acc> weight;
    std::vector<double> bias;
  };

  template <int kLanes, Distance kind>
  void cells_backward(const Chunk& chunk, Scratch& scratch, AdapterGradient* adapter) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const int64_t channels = level.teacher.channels, cells = level.student.cells;
    const int64_t image = chunk.image * cells;
    const Acc* channel_weights =
        level.channel_weights ? level.channel_weights + chunk.image * channels : nullptr;
    const Acc scale = static_cast<Acc>(level.scale);
    // Between the runs; NCHW memory is filled at once, since each gap is a piece of every plane.
    const GradientMap& gradient = level.gradient;
    int64_t filled = chunk.first;
    if (!gradient.map.channels_last) {
      if (chunk.runs.empty() || chunk.runs[0].count < chunk.last - chunk.first) {
        gradient.fill_cells(chunk.image, chunk.first, chunk.last);
      }
      filled = chunk.last;
    }
    // Where the gradient lies as it is computed, it is stored in small pieces at once.
    const bool direct = gradient.map.channels_last && !level.adapted();
    for_each_batch(chunk, scratch, [&](const Batch& batch) {
      const Acc* const student = read(level.student, chunk.image, batch, scratch.student.get());
      const Acc* t = read(level.teacher, chunk.image, batch, scratch.teacher.get());
      const Acc* s = student;
      if (level.adapted()) {
        adapt(level, s, batch.cells, scratch.adapted.get());
        s = scratch.adapted.get();
      }
      Acc* out = scratch.adapted.get(); // in place of the adapted student
      for (int64_t i = 0; i < batch.count; ++i) {
        const Run& run = batch.runs[i];
        if (filled < run.first) {
          gradient.fill_cells(chunk.image, filled, run.first);
        }
        filled = std::max(filled, run.first + run.count);
        // Calls compute(at, n, out) for the numbers of the run from `first` on.
        const auto emit = [&](int64_t first, int64_t count, const auto& compute) {
          for (int64_t at = first, n; at < first + count; at += n) {
            n = std::min(first + count - at, direct ? kStoredNumbers : count);
            compute(at, n, direct ? out : out + at);
            if (direct) {
              gradient.store(
                  gradient.map.cell(chunk.image, run.first) + at * gradient.map.element, out, n);
            }
          }
        };
        if constexpr (kind == Distance::kCosine) {
          const Acc* student_factors = level.coefficients + image + run.first;
          const Acc* teacher_factors = student_factors + level.student.images * cells;
          for (int64_t j = 0; j < run.count; ++j) {
            const Acc a = scale * student_factors[j], b = scale * teacher_factors[j];
            emit(j * channels, channels, [&](int64_t at, int64_t n, Acc* to) {
              affine_gradient(s + at, t + at, Acc(0), Acc(0), a, b, n, to);
            });
          }
        } else if constexpr (kind == Distance::kPkd) {
          for (int64_t j = 0; j < run.count; ++j) {
            emit(j * channels, channels, [&](int64_t at, int64_t n, Acc* to) {
              const Acc* of_channels = level.coefficients + at - j * channels;
              affine_gradient(s + at, t + at, of_channels, channels, scale, n, to);
            });
          }
        } else {
          const Acc* w = level.cell_weights ? level.cell_weights + image + run.first : nullptr;
          for_each_weight(
              w, channel_weights, run.count, [&](int64_t first, int64_t count, Acc weight) {
                emit(first * channels, count * channels, [&](int64_t at, int64_t n, Acc* to) {
                  if (channel_weights) {
                    const Acc* of_channels = channel_weights + at - first * channels;
                    distance_gradient<kind, true>(
                        s + at, t + at, of_channels, scale * weight, n, to);
                  } else {
                    distance_gradient<kind, false>(
                        s + at, t + at, channel_weights, scale * weight, n, to);
                  }
                });
              });
        }
        s += run.count * channels;
        t += run.count * channels;
        out += direct ? 0 : run.count * channels;
      }
      if (direct) {
        return;
      }
      Acc* rows = scratch.adapted.get();
      if (level.adapted()) {
        rows = through_adapter(level, student, rows, batch.cells, scratch, *adapter);
      }
      for (int64_t i = 0; i < batch.count; ++i) {
        gradient.store_cells(chunk.image, batch.runs[i].first, batch.runs[i].count, rows);
        rows += batch.runs[i].count * level.student.channels;
      }
    });
    if (filled < chunk.last) {
      gradient.fill_cells(chunk.image, filled, chunk.last);
    }
  }

  // From the gradient of the adapted student, (cells, C_t), to that of the student, (cells, C_s).
  HKD_NOINLINE Acc* through_adapter(
      const ImitationLevel<Acc>& level,
      const Acc* student,
      const Acc* adapted,
      int64_t cells,
      Scratch& scratch,
      AdapterGradient& sums) const {
    const int64_t c_s = level.student.channels, c_t = level.teacher.channels;
    multiply(scratch.product.get(), adapted, true, student, false, c_t, c_s, cells);
    for (int64_t i = 0; i < c_t * c_s; ++i) {
      sums.weight[i] += scratch.product[i];
    }
    for (int64_t i = 0; level.bias >= 0 && i < cells; ++i) {
      for (int64_t c = 0; c < c_t; ++c) {
        sums.bias[c] += adapted[i * c_t + c];
      }
    }
    const Acc* weight = weights[level.weight].values.data();
    multiply(scratch.teacher.get(), adapted, false, weight, false, cells, c_s, c_t);
    return scratch.teacher.get();
  }

  // Tasks first to last - 1: all, or those of one level.
  void backward(const ImitationLevel<Acc>& level, int64_t first, int64_t last) {
    std::vector<AdapterGradient> parts(level.adapted() ? last - first : 0);
    for (AdapterGradient& part : parts) {
      part.weight.resize(weights[level.weight].values.size());
      part.bias.resize(level.bias >= 0 ? level.teacher.channels : 0);
    }
    run(first, last, [&](auto lanes, auto kind, int64_t task, Scratch& scratch) {
      const Chunk& chunk = chunks_[tasks_[task].chunk];
      if (on_planes(level_of(chunk))) {
        planes_backward<lanes(), kind()>(tasks_[task], scratch);
      } else {
        cells_backward<lanes(), kind()>(
            chunk, scratch, parts.empty() ? nullptr : &parts[task - first]);
      }
    });
    for (const AdapterGradient& part : parts) {
      add(part.weight, weights[level.weight].gradient);
      if (level.bias >= 0) {
        add(part.bias, biases[level.bias].gradient);
      }
    }
  }

  template <typename T>
  static void add(const std::vector<T>& part, std::vector<double>& total) {
    for (size_t i = 0; i < part.size(); ++i) {
      total[i] += part[i];
    }
  }

  // -------------------------------------------------------------------------------- road of planes
  static Acc channel_weight(const ImitationLevel<Acc>& level, int64_t image, int64_t channel) {
    return level.channel_weights ? level.channel_weights[image * level.teacher.channels + channel]
                                 : Acc(1);
  }

  // All channels of a chunk; channels are added up over the cells of a run.
  double planes_cosine(const Chunk& chunk, Scratch& scratch) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const int64_t image = chunk.image * level.student.cells;
    clear_cosines(chunk);
    double sum = 0;
    for (const Run& run : chunk.runs) {
      const int64_t n = run.count;
      Acc* parts = scratch.sums.get();
      scratch.totals.assign(3 * n, 0);
      std::fill_n(parts, 3 * n, Acc(0));
      for (int64_t c = 0; c < level.teacher.channels; ++c) {
        const Acc* s =
            read_plane(level.student, chunk.image, c, run.first, n, scratch.student.get());
        const Acc* t =
            read_plane(level.teacher, chunk.image, c, run.first, n, scratch.teacher.get());
        add_products(s, t, n, parts);
        if (c % kProducts == kProducts - 1 || c == level.teacher.channels - 1) {
          for (int64_t i = 0; i < 3 * n; ++i) {
            scratch.totals[i] += parts[i];
            parts[i] = 0;
          }
        }
      }
      const double* totals = scratch.totals.data();
      for (int64_t i = 0; i < n; ++i) {
        const int64_t cell = image + run.first + i;
        const Acc weight = level.cell_weights ? level.cell_weights[cell] : Acc(1);
        if (weight != 0) {
          sum += put_cosine(level, cell, weight, totals[i], totals[n + i], totals[2 * n + i]);
        }
      }
    }
    return sum;
  }

  // The moments of the channels of a task.
  template <int kLanes>
  void planes_moments(const Task& task, Scratch& scratch, double* moments) const {
    const Chunk& chunk = chunks_[task.chunk];
    const ImitationLevel<Acc>& level = level_of(chunk);
    const int64_t channels = level.teacher.channels;
    for (int64_t c = task.first_channel; c < task.last_channel; ++c) {
      Moments<double> channel = {};
      for (const Run& run : chunk.runs) {
        for (int64_t done = 0; done < run.count; done += kPivotCells) {
          const int64_t first = run.first + done, n = std::min(kPivotCells, run.count - done);
          const Acc* s = read_plane(level.student, chunk.image, c, first, n, scratch.student.get());
          const Acc* t = read_plane(level.teacher, chunk.image, c, first, n, scratch.teacher.get());
          channel.merge(moments_of_plane<kLanes>(s, t, n));
        }
      }
      const double values[] = {channel.s_mean, channel.t_mean, channel.ss, channel.tt, channel.st};
      for (int i = 0; i < 5; ++i) {
        moments[i * channels + c] = values[i];
      }
    }
  }

  // The sum over the channels of a task.
  template <int kLanes, Distance kind>
  double planes_distances(const Task& task, Scratch& scratch) const {
    const bool weighted = level_of(chunks_[task.chunk]).cell_weights;
    int64_t c = task.first_channel;
    double sum = 0;
    for (; weighted && c + kPlanes <= task.last_channel; c += kPlanes) {
      sum += sum_of_planes<kLanes, kind, true, kPlanes>(chunks_[task.chunk], c, scratch);
    }
    for (; c < task.last_channel; ++c) {
      sum += weighted ? sum_of_planes<kLanes, kind, true, 1>(chunks_[task.chunk], c, scratch)
                      : sum_of_planes<kLanes, kind, false, 1>(chunks_[task.chunk], c, scratch);
    }
    return sum;
  }

  template <int kLanes, Distance kind, bool weighted, int planes>
  double sum_of_planes(const Chunk& chunk, int64_t channel, Scratch& scratch) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const Acc* weights =
        weighted ? level.cell_weights + chunk.image * level.student.cells : nullptr;
    const int64_t strip = kStripNumbers / planes;
    LaneSum<Acc, kLanes> sums[planes];
    int64_t terms = 0; // of a plane
    double sum = 0;
    const auto flush = [&] {
      for (int k = 0; k < planes; ++k) {
        const double weight = channel_weight(level, chunk.image, channel + k);
        sum += weight == 0 ? 0 : weight * sums[k].total();
        sums[k] = {};
      }
      terms = 0;
    };
    for (const Run& run : chunk.runs) {
      for (int64_t done = 0; done < run.count; done += strip) {
        const int64_t first = run.first + done, n = std::min(run.count - done, strip);
        if (terms + n > kSumLength) {
          flush();
        }
        terms += n;
        add_distances<kind, weighted, planes>(
            read_planes<planes>(
                level.student, chunk.image, channel, first, n, scratch.student.get()),
            read_planes<planes>(
                level.teacher, chunk.image, channel, first, n, scratch.teacher.get()),
            weights + (weighted ? first : 0),
            n,
            sums);
      }
    }
    flush();
    return sum;
  }

  // The same cells of neighbouring planes.
  template <int planes>
  static Strips<Acc> read_planes(
      const AnyMap& map, int64_t image, int64_t channel, int64_t first, int64_t n, Acc* buffer) {
    if (map.type == scalar_type_of<Acc>()) {
      return {reinterpret_cast<const Acc*>(map.plane(image, channel, first)), map.cells};
    }
    for (int k = 0; k < planes; ++k) {
      load_numbers(buffer + k * n, map.plane(image, channel + k, first), map.type, n);
    }
    return {buffer, n};
  }

  template <int kLanes, Distance kind>
  double planes_forward(const Task& task, Scratch& scratch, double* moments) const {
    if constexpr (kind == Distance::kCosine) {
      return planes_cosine(chunks_[task.chunk], scratch);
    } else if constexpr (kind == Distance::kPkd) {
      planes_moments<kLanes>(task, scratch, moments);
      return 0;
    } else {
      return planes_distances<kLanes, kind>(task, scratch);
    }
  }

  template <int kLanes, Distance kind>
  void planes_backward(const Task& task, Scratch& scratch) const {
    const Chunk& chunk = chunks_[task.chunk];
    const GradientMap& gradient = level_of(chunk).gradient;
    const int64_t planes = planes_of(level_of(chunk));
    for (int64_t c = task.first_channel; c < task.last_channel; c += planes) {
      const int64_t last_channel = std::min(c + planes, task.last_channel);
      int64_t filled = chunk.first;
      const auto fill_until = [&](int64_t cell) {
        for (int64_t k = c; k < last_channel && filled < cell; ++k) {
          gradient.fill(
              gradient.map.plane(chunk.image, k, filled), (cell - filled) * gradient.map.element);
        }
        filled = cell;
      };
      for (const Run& run : chunk.runs) {
        fill_until(run.first);
        for (int64_t k = c; k < last_channel; ++k) {
          run_backward<kind>(chunk, run, k, scratch);
        }
        filled = run.first + run.count;
      }
      fill_until(chunk.last);
    }
  }

  // The gradient of a run of one plane.
  template <Distance kind>
  void run_backward(const Chunk& chunk, const Run& run, int64_t c, Scratch& scratch) const {
    const ImitationLevel<Acc>& level = level_of(chunk);
    const GradientMap& gradient = level.gradient;
    const int64_t channels = level.teacher.channels;
    const int64_t image = chunk.image * level.student.cells;
    const Acc* w = level.cell_weights ? level.cell_weights + image : nullptr;
    const Acc weight = channel_weight(level, chunk.image, c);
    const Acc scale = static_cast<Acc>(level.scale) * weight;
    if (weight == 0) {
      return gradient.fill(
          gradient.map.plane(chunk.image, c, run.first), run.count * gradient.map.element);
    }
    Acc* const out = scratch.adapted.get();
    for (int64_t done = 0; done < run.count; done += kStoredNumbers) {
      const int64_t first = run.first + done, count = std::min(run.count - done, kStoredNumbers);
      const Acc* s = read_plane(level.student, chunk.image, c, first, count, scratch.student.get());
      const Acc* t = read_plane(level.teacher, chunk.image, c, first, count, scratch.teacher.get());
      if constexpr (kind == Distance::kPkd) {
        const Acc* of_channel = level.coefficients + c;
        affine_gradient(
            s,
            t,
            of_channel[0],
            of_channel[channels],
            scale * of_channel[2 * channels],
            scale * of_channel[3 * channels],
            count,
            out);
      } else if constexpr (kind == Distance::kCosine) {
        const Acc* factors = level.coefficients + image + first;
        linear_gradient(
            s, t, factors, factors + level.student.images * level.student.cells, scale, count, out);
      } else if (w) {
        distance_gradient<kind, true>(s, t, w + first, scale, count, out);
      } else {
        distance_gradient<kind, false>(s, t, w, scale, count, out);
      }
      gradient.store(gradient.map.plane(chunk.image, c, first), out, count);
    }
  }

  // ---------------------------------------------------------------------------------------------
  // PKD: from the moments of the chunks to the levels' losses and coefficients.
  void correlate(const std::vector<std::vector<double>>& moments, std::vector<double>& sums) {
    for (size_t l = 0; l < levels.size(); ++l) {
      const int64_t channels = levels[l].teacher.channels;
      for (int64_t c = 0; c < channels; ++c) {
        Moments<double> all = {};
        for (size_t i = 0; i < chunks_.size(); ++i) {
          if (chunks_[i].level == static_cast<int>(l)) {
            const double* m = moments[i].data() + c;
            const double count = static_cast<double>(chunks_[i].last - chunks_[i].first);
            all.merge(
                {count, m[0], m[channels], m[2 * channels], m[3 * channels], m[4 * channels]});
          }
        }
        if (all.count > 0) {
          const PkdChannel<double> channel = pkd_channel(all);
          sums[l] += channel.loss;
          const double values[] = {all.s_mean, all.t_mean, channel.student, channel.teacher};
          for (int i = 0; i < 4; ++i) {
            levels[l].coefficients[i * channels + c] = static_cast<Acc>(values[i]);
          }
        }
      }
    }
  }
};

} // namespace hkd
