// Distance of the RoI-aligned features of two pyramids on the CPU, forward and backward.
//
// Neither pooled tensor is stored, and nothing is kept between forward and backward. There are two
// routes for the boxes of a level:
//
//   difference: without an adapter, elementwise distances look at pooled(S) - pooled(T), which is
//     pooled(S - T), since pooling is linear. It is pooled for one box and a few channels at a
//     time; backward, the thread that owns these channels of the gradient does it again and adds
//     there.
//   rows: cosine and adapters need every channel of a bin. Both maps are pooled for a block of
//     boxes, into rows of channels that the adapter multiplies by library matrix products.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "hkd/distances.h"
#include "matrix_product.h"
#include "parallel.h"
#include "roi_align/blocks.h"
#include "roi_align/gradients.h"
#include "roi_distillation/roi_distillation_arguments.h"
#include "simd.h"

namespace hkd {
namespace {

// Boxes of the rows route that are pooled at a time; there are up to four buffers of their bins.
constexpr int64_t kBoxesOfRows = 16;

// sum of element(i), i < n, in double; the lanes make it a plain vector loop.
template <int kLanes, typename Acc, typename Element>
double sum_elements(int64_t n, const Element& element) {
  Acc lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] += element(i + j);
    }
  }
  double sum = 0;
  for (int j = 0; j < kLanes; ++j) {
    sum += lanes[j];
  }
  for (; i < n; ++i) {
    sum += element(i);
  }
  return sum;
}

// Calls body with the distance as a constant; only elementwise ones.
template <typename Body>
void dispatch_elementwise(Distance distance, const Body& body) {
  switch (distance) {
    case Distance::kMse:
      return body(std::integral_constant<Distance, Distance::kMse>{});
    case Distance::kL1:
      return body(std::integral_constant<Distance, Distance::kL1>{});
    default:
      return body(std::integral_constant<Distance, Distance::kSmoothL1>{});
  }
}

// Pooled values: `rows` rows of `width`, `stride` apart; channels of a bin, where that matters. The
// teacher's are null where the student's are the differences already.
template <typename Acc>
struct Bins {
  Acc* student;
  const Acc* teacher;
  int64_t rows, width, stride;
};

template <int kLanes, typename Acc>
CosineCell<double> cosine_of(const Acc* s, const Acc* t, int64_t n) {
  return cosine_cell<double>(
      sum_elements<kLanes, Acc>(n, [&](int64_t i) { return s[i] * t[i]; }),
      sum_elements<kLanes, Acc>(n, [&](int64_t i) { return s[i] * s[i]; }),
      sum_elements<kLanes, Acc>(n, [&](int64_t i) { return t[i] * t[i]; }));
}

// Sum of the distances; an elementwise one also sums over channels.
template <typename Acc>
double sum_distances(Distance distance, const Bins<Acc>& bins) {
  double sum = 0;
  with_lanes<Acc>([&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    for (int64_t row = 0; row < bins.rows; ++row) {
      const Acc* s = bins.student + row * bins.stride;
      const Acc* t = bins.teacher + (bins.teacher ? row * bins.stride : 0);
      if (distance == Distance::kCosine) {
        sum += cosine_of<kLanes>(s, t, bins.width).distance;
        continue;
      }
      dispatch_elementwise(distance, [&](auto kind) {
        constexpr Distance kKind = decltype(kind)::value;
        const auto distance_of = [](Acc difference) {
          Acc value;
          element_distance<kKind>(difference, value);
          return value;
        };
        sum += bins.teacher ? sum_elements<kLanes, Acc>(
                                  bins.width, [&](int64_t i) { return distance_of(s[i] - t[i]); })
                            : sum_elements<kLanes, Acc>(
                                  bins.width, [&](int64_t i) { return distance_of(s[i]); });
      });
    }
  });
  return sum;
}

// The student's values become scale times the gradient of sum_distances.
template <typename Acc>
void differentiate(Distance distance, double scale, const Bins<Acc>& bins) {
  with_lanes<Acc>([&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    const Acc factor = static_cast<Acc>(scale);
    for (int64_t row = 0; row < bins.rows; ++row) {
      Acc* s = bins.student + row * bins.stride;
      const Acc* t = bins.teacher + (bins.teacher ? row * bins.stride : 0);
      if (distance == Distance::kCosine) {
        const CosineCell<double> cell = cosine_of<kLanes>(s, t, bins.width);
        const Acc of_student = static_cast<Acc>(scale * cell.student);
        const Acc of_teacher = static_cast<Acc>(scale * cell.teacher);
        for (int64_t i = 0; i < bins.width; ++i) {
          s[i] = of_student * s[i] + of_teacher * t[i];
        }
        continue;
      }
      if (bins.teacher) {
        for (int64_t i = 0; i < bins.width; ++i) {
          s[i] -= t[i];
        }
      }
      dispatch_elementwise(distance, [&](auto kind) {
        constexpr Distance kKind = decltype(kind)::value;
        for (int64_t i = 0; i < bins.width; ++i) {
          s[i] = factor * element_slope<kKind>(s[i]);
        }
      });
    }
  });
}

// A piece whose values are differences.
template <typename Acc>
Bins<Acc> differences(const Piece<Acc>& piece) {
  return {piece.values, nullptr, piece.runs(), piece.run(), piece.stride};
}

// A piece from, or to, rows of channels: one row a bin, `stride` apart.
template <typename Acc>
void copy_bins(const Piece<Acc>& piece, Acc* to, int64_t stride) {
  for (int64_t row = 0; row < piece.rows; ++row) {
    for (int64_t column = 0; column < piece.columns; ++column, to += stride) {
      for (int64_t c = 0; c < piece.count; ++c) {
        to[c] = piece.values[piece.at(row, column, c)];
      }
    }
  }
}

template <typename Acc>
void copy_bins(const Acc* from, int64_t stride, const Piece<Acc>& piece) {
  for (int64_t row = 0; row < piece.rows; ++row) {
    for (int64_t column = 0; column < piece.columns; ++column, from += stride) {
      for (int64_t c = 0; c < piece.count; ++c) {
        piece.values[piece.at(row, column, c)] = from[c];
      }
    }
  }
}

// The rows route of one call.
template <typename Acc>
class [[gnu::visibility("hidden")]] Rows {
 public:
  Rows(
      const RoiDistillation& arguments,
      RoiBlocks<Acc>& blocks,
      const std::vector<StoredMap>& student,
      const std::vector<StoredMap>& teacher)
      : arguments_(arguments), blocks_(blocks), student_(student), teacher_(teacher) {
  }

  // Pooled values of a block, (boxes x bins, channels).
  Tensor student(const RoiBlock& block) {
    return pooled(block, student_[block.level]);
  }
  Tensor teacher(const RoiBlock& block) {
    return pooled(block, teacher_[block.level]);
  }

  // The student's rows in the teacher's space.
  Tensor adapted(int level, const Tensor& rows) const {
    const int64_t weight = arguments_.weight_of_level[level];
    const int64_t bias = arguments_.bias_of_level[level];
    if (weight < 0) {
      return rows;
    }
    const Tensor& matrix = arguments_.weights[weight];
    Tensor out = torch::stable::new_empty(rows, {rows.size(0), matrix.size(0)});
    multiply_in_strips(
        out.template mutable_data_ptr<Acc>(),
        rows.template const_data_ptr<Acc>(),
        false,
        matrix.template const_data_ptr<Acc>(),
        true,
        rows.size(0),
        matrix.size(0),
        matrix.size(1));
    if (bias >= 0) {
      const Acc* term = arguments_.biases[bias].template const_data_ptr<Acc>();
      Acc* row = out.template mutable_data_ptr<Acc>();
      for (int64_t r = 0; r < out.size(0); ++r, row += out.size(1)) {
        for (int64_t c = 0; c < out.size(1); ++c) {
          row[c] += term[c];
        }
      }
    }
    return out;
  }

  // Calls body(box, its bins) for every box of a block, in parallel.
  template <typename Body>
  void for_each_box(
      const RoiBlock& block, const Tensor& student, const Tensor& teacher, const Body& body) const {
    const int64_t bins = arguments_.options.bins(), width = teacher.size(1);
    Acc* s = student.template mutable_data_ptr<Acc>();
    const Acc* t = teacher.template const_data_ptr<Acc>();
    for_each_worker(block.count, [&](int64_t, const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) {
        const int64_t at = i * bins * width;
        body(block.begin + i, Bins<Acc>{s + at, t + at, bins, width, width});
      }
    });
  }

 private:
  Tensor pooled(const RoiBlock& block, const StoredMap& map) {
    const int64_t bins = arguments_.options.bins(), channels = map.map.channels;
    Tensor rows = torch::stable::new_empty(
        arguments_.student[0], {block.count * bins, channels}, accumulate_type(arguments_.type()));
    Acc* data = rows.template mutable_data_ptr<Acc>();
    blocks_.for_each_piece(
        block,
        map.map.channels_last,
        channels,
        [&](Piece<Acc> piece, PoolingScratch<Acc>& scratch) {
          Acc* to = data + (piece.box - block.begin) * bins * channels + piece.first;
          if (!piece.planes) {
            piece.values = to;
            piece.stride = channels;
          }
          pool(blocks_.weights(piece.box), map, nullptr, piece, scratch);
          if (piece.planes) {
            copy_bins(piece, to, channels);
          }
        });
    return rows;
  }

  const RoiDistillation& arguments_;
  RoiBlocks<Acc>& blocks_;
  const std::vector<StoredMap>&student_, &teacher_;
};

template <typename Acc>
double total_distance(const RoiDistillation& arguments) {
  if (arguments.teacher_channels() == 0) {
    return 0; // the cosine of nothing too
  }
  const std::vector<StoredMap> student = stored_maps(arguments.student);
  const std::vector<StoredMap> teacher = stored_maps(arguments.teacher);
  const int64_t channels = arguments.student_channels();
  RoiBlocks<Acc> blocks(arguments.boxes, arguments.options, map_shapes(student), false);
  Rows<Acc> rows(arguments, blocks, student, teacher);

  // One sum a piece, added up in order at the end.
  const int64_t places = std::max<int64_t>((channels + kPlanes - 1) / kPlanes, 1);
  std::vector<double> sums(blocks.count() * places);
  const int64_t size = arguments.by_rows() ? kBoxesOfRows : blocks.count();
  blocks.for_each(size, [&](const RoiBlock& block) {
    if (arguments.by_difference(block.level)) {
      blocks.for_each_piece(
          block,
          student[block.level].map.channels_last,
          channels,
          [&](const Piece<Acc>& piece, PoolingScratch<Acc>& scratch) {
            pool(
                blocks.weights(piece.box),
                student[block.level],
                &teacher[block.level],
                piece,
                scratch);
            sums[blocks.row(piece.box) * places + piece.first / kPlanes] =
                sum_distances(arguments.distance, differences(piece));
          });
    } else {
      const Tensor s = rows.adapted(block.level, rows.student(block)), t = rows.teacher(block);
      rows.for_each_box(block, s, t, [&](int64_t box, const Bins<Acc>& values) {
        sums[blocks.row(box) * places] = sum_distances(arguments.distance, values);
      });
    }
  });

  double total = 0;
  for (const double sum : sums) {
    total += sum;
  }
  return total;
}

// Gradients of the adapters, added up in double.
struct AdapterGradients {
  std::vector<std::vector<double>> weights, biases;

  explicit AdapterGradients(const RoiDistillation& arguments) {
    for (const Tensor& weight : arguments.weights) {
      weights.emplace_back(weight.numel());
    }
    for (const Tensor& bias : arguments.biases) {
      biases.emplace_back(bias.numel());
    }
  }

  // Adds one block: `gradient` are rows (bins, C_t) of the adapted values, `pooled` their inputs.
  template <typename Acc>
  void add(
      const RoiDistillation& arguments, int level, const Tensor& gradient, const Tensor& pooled) {
    std::vector<double>& sums = weights[arguments.weight_of_level[level]];
    std::vector<Acc> block(sums.size());
    multiply_in_strips(
        block.data(),
        gradient.const_data_ptr<Acc>(),
        true,
        pooled.const_data_ptr<Acc>(),
        false,
        gradient.size(1),
        pooled.size(1),
        pooled.size(0));
    for (std::size_t i = 0; i < sums.size(); ++i) {
      sums[i] += block[i];
    }
    if (arguments.bias_of_level[level] >= 0) {
      std::vector<double>& bias = biases[arguments.bias_of_level[level]];
      const Acc* row = gradient.const_data_ptr<Acc>();
      for (int64_t r = 0; r < gradient.size(0); ++r, row += bias.size()) {
        for (std::size_t c = 0; c < bias.size(); ++c) {
          bias[c] += row[c];
        }
      }
    }
  }

  // The sums in the shapes and dtypes of the adapters.
  template <typename Acc>
  static std::vector<Tensor> finish(
      const std::vector<std::vector<double>>& sums, const std::vector<Tensor>& like) {
    std::vector<Tensor> gradients;
    for (std::size_t i = 0; i < like.size(); ++i) {
      std::vector<int64_t> shape(like[i].sizes().begin(), like[i].sizes().end());
      Tensor gradient = torch::stable::new_empty(
          like[i], shape, std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float);
      std::copy(sums[i].begin(), sums[i].end(), gradient.mutable_data_ptr<Acc>());
      gradients.push_back(torch::stable::to(gradient, like[i].scalar_type()));
    }
    return gradients;
  }
};

template <typename Acc>
void add_gradients(
    const RoiDistillation& arguments,
    double scale,
    const std::vector<FeatureMap<Acc>>& gradients,
    AdapterGradients* adapters) {
  const std::vector<StoredMap> student = stored_maps(arguments.student);
  const std::vector<StoredMap> teacher = stored_maps(arguments.teacher);
  const int64_t bins = arguments.options.bins(), channels = arguments.student_channels();
  RoiBlocks<Acc> blocks(arguments.boxes, arguments.options, map_shapes(student), true);
  Rows<Acc> rows(arguments, blocks, student, teacher);

  blocks.scatter(
      blocks.all(),
      gradients,
      [&](int level) { return arguments.by_difference(level); },
      [&](const Piece<Acc>& piece, PoolingScratch<Acc>& scratch) {
        const int level = blocks.level(piece.box);
        pool(blocks.weights(piece.box), student[level], &teacher[level], piece, scratch);
        differentiate(arguments.distance, scale, differences(piece));
      });

  blocks.for_each(kBoxesOfRows, [&](const RoiBlock& block) {
    if (arguments.by_difference(block.level)) {
      return;
    }
    const Tensor s = rows.student(block), t = rows.teacher(block);
    Tensor values = rows.adapted(block.level, s);
    rows.for_each_box(block, values, t, [&](int64_t, const Bins<Acc>& of_box) {
      differentiate(arguments.distance, scale, of_box);
    });
    const int64_t weight = arguments.weight_of_level[block.level];
    if (weight >= 0) {
      adapters->add<Acc>(arguments, block.level, values, s);
      const Tensor& matrix = arguments.weights[weight];
      Tensor product = torch::stable::new_empty(values, {values.size(0), matrix.size(1)});
      multiply_in_strips(
          product.template mutable_data_ptr<Acc>(),
          values.template const_data_ptr<Acc>(),
          false,
          matrix.template const_data_ptr<Acc>(),
          false,
          values.size(0),
          matrix.size(1),
          matrix.size(0));
      values = product;
    }
    const Acc* from = values.template const_data_ptr<Acc>();
    blocks.scatter(
        block,
        gradients,
        [](int) { return true; },
        [&](const Piece<Acc>& piece, PoolingScratch<Acc>&) {
          const int64_t box = piece.box - block.begin;
          copy_bins(from + box * bins * channels + piece.first, channels, piece);
        });
  });
}

Tensor roi_distillation_loss_cpu(const RoiDistillation& arguments) {
  Tensor loss =
      torch::stable::new_empty(arguments.student[0], {}, accumulate_type(arguments.type()));
  if (arguments.type() == ScalarType::Double) {
    *loss.mutable_data_ptr<double>() = total_distance<double>(arguments) / arguments.normalizer();
  } else {
    *loss.mutable_data_ptr<float>() =
        static_cast<float>(total_distance<float>(arguments) / arguments.normalizer());
  }
  return loss;
}

RoiDistillationGradients roi_distillation_loss_backward_cpu(
    const Tensor& grad, const RoiDistillation& arguments, bool) { // always deterministic
  Gradients gradients(arguments.student[0], map_shapes(stored_maps(arguments.student)));
  AdapterGradients adapters(arguments);
  const auto run = [&](auto number) {
    using Acc = decltype(number);
    const double scale = *grad.const_data_ptr<Acc>() / arguments.normalizer();
    add_gradients<Acc>(arguments, scale, gradients.maps<Acc>(), &adapters);
    return std::make_tuple(
        gradients.finish(),
        AdapterGradients::finish<Acc>(adapters.weights, arguments.given_weights),
        AdapterGradients::finish<Acc>(adapters.biases, arguments.given_biases));
  };
  return arguments.type() == ScalarType::Double ? run(double{}) : run(float{});
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, CPU, m) {
  m.impl("roi_distillation_loss", TORCH_BOX(&roi_distillation_loss<roi_distillation_loss_cpu>));
  m.impl(
      "roi_distillation_loss_backward",
      TORCH_BOX(&roi_distillation_loss_backward<roi_distillation_loss_backward_cpu>));
}

} // namespace hkd
