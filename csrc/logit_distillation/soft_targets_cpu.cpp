// KL divergence and cross-entropy against a teacher's classes on the CPU, forward and backward,
// over a list of tensors.
//
// Vectors run across rows where there are few classes, and along the classes of one row where there
// are many: either way over a tile of steps x kLanes logits, one class (or kLanes classes) a step.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "hkd/soft_targets.h"
#include "tensor_list.h"

namespace hkd {
namespace {

constexpr int64_t kLanes = 32;
constexpr int64_t kFewClasses = 128; // a tile of as many fits the second-level cache twice
constexpr int64_t kElementsPerBlock = 8192;

struct Options {
  double temperature;
  bool sigmoid, kl;
};

// The logits (..., K) of a list as rows, and how tiles are made of them.
struct Rows {
  std::vector<Tensor> student, teacher, weights;
  std::vector<int64_t> counts;
  int64_t classes = 0;
  bool across; // lanes are rows
  int64_t steps, per_tile, per_block;
  std::vector<Block> blocks;

  Rows(
      const std::vector<Tensor>& student_logits,
      const std::vector<Tensor>& teacher_logits,
      const std::vector<Tensor>& row_weights,
      const std::optional<Tensor>& class_weights) {
    STD_TORCH_CHECK(!student_logits.empty(), "student_logits is an empty list.");
    check_list("student_logits", student_logits, student_logits);
    check_list("teacher_logits", teacher_logits, student_logits);
    STD_TORCH_CHECK(student_logits[0].dim() > 0, "student_logits[0] must have shape (..., K).");
    classes = student_logits[0].size(-1);
    const ScalarType loss_type = accumulate_type(student_logits[0].scalar_type());
    for (size_t i = 0; i < student_logits.size(); ++i) {
      const Tensor& logits = student_logits[i];
      STD_TORCH_CHECK(
          logits.dim() > 0 && logits.size(-1) == classes,
          "student_logits[",
          i,
          "] must have shape (..., ",
          classes,
          ").");
      int64_t count = 1;
      for (int64_t axis = 0; axis + 1 < logits.dim(); ++axis) {
        count *= logits.size(axis);
      }
      counts.push_back(count);
      student.push_back(torch::stable::contiguous(logits));
      teacher.push_back(torch::stable::contiguous(teacher_logits[i]));
    }
    STD_TORCH_CHECK(
        row_weights.empty() || row_weights.size() == counts.size(),
        "weights must have one tensor for each of student_logits.");
    for (size_t i = 0; i < row_weights.size(); ++i) {
      STD_TORCH_CHECK(
          row_weights[i].is_cpu() && row_weights[i].numel() == counts[i] &&
              row_weights[i].scalar_type() == loss_type,
          "weights must be one number a row on the CPU, in the dtype of the loss.");
      weights.push_back(torch::stable::contiguous(row_weights[i]));
    }
    STD_TORCH_CHECK(
        !class_weights || (class_weights->is_cpu() && class_weights->numel() == classes &&
                           class_weights->scalar_type() == loss_type),
        "class_weights must be one number a class on the CPU, in the dtype of the loss.");
    across = classes <= kFewClasses;
    steps = across ? classes : (classes + kLanes - 1) / kLanes;
    per_tile = across ? kLanes : 1;
    per_block = std::max<int64_t>(1, kElementsPerBlock / std::max<int64_t>(1, classes * per_tile)) *
                per_tile;
    blocks = cut_into_blocks(classes > 0 ? counts : std::vector<int64_t>{}, per_block);
  }

  int64_t tile_size() const {
    return steps * kLanes;
  }

  // max(sum of the weights, 1); rows weigh 1 each where there are none.
  template <typename Acc>
  double normalizer() const {
    double sum = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      sum += weights.empty() ? static_cast<double>(counts[i])
                             : sum_of(weights[i].const_data_ptr<Acc>(), counts[i]);
    }
    return at_least_one(sum);
  }

  // Per tensor the weights of its rows, null where there are none.
  template <typename Acc>
  std::vector<const Acc*> weight_pointers() const {
    std::vector<const Acc*> pointers(counts.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      pointers[i] = weights[i].const_data_ptr<Acc>();
    }
    return pointers;
  }

  // The class weights as a tile; empty where there are none.
  template <typename Acc>
  std::vector<Acc> class_weight_tile(const std::optional<Tensor>& class_weights) const {
    if (!class_weights) {
      return {};
    }
    const Tensor stored = torch::stable::contiguous(*class_weights);
    const Acc* given = stored.const_data_ptr<Acc>();
    std::vector<Acc> tile(tile_size());
    for (int64_t i = 0; i < tile_size(); ++i) {
      const int64_t k = across ? i / kLanes : i;
      tile[i] = k < classes ? given[k] : Acc(0);
    }
    return tile;
  }

  // Lays `rows` rows from `row` on out as a tile. Lanes without a row are 0; classes beyond the
  // last are minus infinity, which no probability is left for. `scratch` holds kLanes rows.
  template <typename Acc>
  void load(const Values& values, int64_t row, int64_t rows, Acc* tile, Acc* scratch) const {
    if (!across) {
      values.copy_to(tile, row * classes, classes);
      std::fill(tile + classes, tile + tile_size(), -static_cast<Acc>(INFINITY));
      return;
    }
    const Acc* source = values.read(row * classes, rows * classes, scratch);
    if (rows < kLanes) {
      std::fill(tile, tile + tile_size(), Acc(0));
    }
    for_known_classes([&](auto known) {
      for (int64_t lane = 0; lane < rows; ++lane) {
        for (int64_t k = 0; k < known; ++k) {
          tile[k * kLanes + lane] = source[lane * known + k];
        }
      }
    });
  }

  template <typename Acc>
  void store(const Acc* tile, int64_t row, int64_t rows, const Values& values, Acc* scratch) const {
    if (!across) {
      return values.write(tile, row * classes, classes);
    }
    for_known_classes([&](auto known) {
      for (int64_t lane = 0; lane < rows; ++lane) {
        for (int64_t k = 0; k < known; ++k) {
          scratch[lane * known + k] = tile[k * kLanes + lane];
        }
      }
    });
    values.write(scratch, row * classes, rows * classes);
  }

  // One and two classes are what detectors of one class have; as constants, they are transposed by
  // vector instructions.
  template <typename Body>
  void for_known_classes(const Body& body) const {
    switch (classes) {
      case 1:
        return body(std::integral_constant<int64_t, 1>());
      case 2:
        return body(std::integral_constant<int64_t, 2>());
      default:
        return body(classes);
    }
  }
};

// Divides by the temperature, for a power of 2 by its reciprocal: as exact, and much faster.
template <typename Acc>
struct Temperature {
  Acc value, reciprocal;
  bool is_power_of_two;

  explicit Temperature(double temperature)
      : value(static_cast<Acc>(temperature)), reciprocal(1 / value) {
    int exponent;
    is_power_of_two = std::frexp(temperature, &exponent) == 0.5;
  }

  template <typename V>
  V divide(const V& logits) const {
    return is_power_of_two ? logits * reciprocal : logits / value;
  }
};

// Calls body with a bool as a constant.
template <typename Body>
void with_constant(bool value, const Body& body) {
  value ? body(std::true_type()) : body(std::false_type());
}

// Weights of `rows` rows from `row` on, lane by lane; 0 in lanes that are no row of their own.
template <typename Acc>
void lane_weights(const Acc* weights, int64_t row, int64_t rows, Acc* lanes) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = lane >= rows ? Acc(0) : weights ? weights[row + lane] : Acc(1);
  }
}

// Replaces every lane by `join` of all, which are joined in halves.
template <typename T, typename Join>
void share(T* lanes, const Join& join) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] = join(lanes[lane], lanes[lane + half]);
    }
  }
  std::fill(lanes + 1, lanes + kLanes, lanes[0]);
}

template <typename T>
void share_maximum(T* lanes) {
  share(lanes, [](T a, T b) { return a > b ? a : b; });
}

template <typename T>
void share_sum(T* lanes) {
  share(lanes, [](T a, T b) { return a + b; });
}

template <typename V>
constexpr int64_t kWidth =
    sizeof(V) / sizeof(std::conditional_t<std::is_same_v<V, double>, double, float>);

template <typename V, typename Acc>
V load(const Acc* values) {
  V vector;
  std::memcpy(&vector, values, sizeof(V));
  return vector;
}

template <typename V, typename Acc>
void store(const V& vector, Acc* values) {
  std::memcpy(values, &vector, sizeof(V));
}

// Adds values, lane by lane.
template <typename Acc>
void add(const Acc* values, double* lanes) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    lanes[lane] += values[lane];
  }
}

// Per lane the sums over the classes of its row. kWeighted: there are class weights.
struct SoftmaxSums {
  double s_exp[kLanes] = {}, t_exp[kLanes] = {}, weight[kLanes] = {}, term[kLanes] = {};
};

template <typename Acc>
void maxima(const Rows& rows, const Acc* tile, Acc* lanes) {
  std::fill(lanes, lanes + kLanes, -static_cast<Acc>(INFINITY));
  for (int64_t i = 0; i < rows.tile_size(); i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = tile[i + lane] > lanes[lane] ? tile[i + lane] : lanes[lane];
    }
  }
  if (!rows.across) {
    share_maximum(lanes);
  }
}

// kKeep: s and t become the exponentials and the weights.
template <typename V, bool kWeighted, bool kKeep, typename Acc>
SoftmaxSums softmax_sums(
    const Rows& rows,
    std::conditional_t<kKeep, Acc, const Acc>* s,
    std::conditional_t<kKeep, Acc, const Acc>* t,
    const Acc* class_weights,
    const Temperature<Acc>& temperature,
    bool kl) {
  Acc s_max[kLanes], t_max[kLanes];
  maxima<Acc>(rows, s, s_max);
  maxima<Acc>(rows, t, t_max);
  SoftmaxSums sums;
  for (int64_t i = 0; i < rows.tile_size(); i += kLanes) {
    Acc s_exp[kLanes], t_exp[kLanes], weight[kLanes], term[kLanes];
    for (int64_t lane = 0; lane < kLanes; lane += kWidth<V>) {
      const SoftmaxTerm<V> one(
          temperature.template divide<V>(load<V>(s + i + lane) - load<V>(s_max + lane)),
          temperature.template divide<V>(load<V>(t + i + lane) - load<V>(t_max + lane)),
          kWeighted ? load<V>(class_weights + i + lane) : V{} + 1,
          kl);
      store(one.s_exp, s_exp + lane);
      store(one.t_exp, t_exp + lane);
      store(one.weight, weight + lane);
      store(one.term, term + lane);
    }
    add(s_exp, sums.s_exp);
    add(t_exp, sums.t_exp);
    if constexpr (kWeighted) {
      add(weight, sums.weight);
    }
    if constexpr (kKeep) {
      std::copy(s_exp, s_exp + kLanes, s + i);
      std::copy(weight, weight + kLanes, t + i);
    } else {
      add(term, sums.term);
    }
  }
  if (!rows.across) {
    share_sum(sums.s_exp);
    share_sum(sums.t_exp);
    share_sum(sums.weight);
    share_sum(sums.term);
  }
  if (!kWeighted) {
    std::copy(sums.t_exp, sums.t_exp + kLanes, sums.weight);
  }
  return sums;
}

template <typename V, bool kWeighted, typename Acc>
void softmax_losses(
    const Rows& rows,
    const Acc* s,
    const Acc* t,
    const Acc* class_weights,
    const Temperature<Acc>& temperature,
    bool kl,
    double* losses) {
  const SoftmaxSums sums =
      softmax_sums<V, kWeighted, false, Acc>(rows, s, t, class_weights, temperature, kl);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    losses[lane] = softmax_row_loss<Acc>(
        sums.s_exp[lane], sums.t_exp[lane], sums.weight[lane], sums.term[lane], kl);
  }
}

template <typename V, bool kWeighted, typename Acc>
void sigmoid_losses(
    const Rows& rows,
    const Acc* s,
    const Acc* t,
    const Acc* class_weights,
    const Temperature<Acc>& temperature,
    bool kl,
    double* losses) {
  std::fill(losses, losses + kLanes, 0.0);
  for (int64_t i = 0; i < rows.tile_size(); i += kLanes) {
    Acc term[kLanes];
    for (int64_t lane = 0; lane < kLanes; lane += kWidth<V>) {
      store(
          sigmoid_term<V>(
              temperature.divide(load<V>(s + i + lane)),
              temperature.divide(load<V>(t + i + lane)),
              kWeighted ? load<V>(class_weights + i + lane) : V{} + 1,
              kl),
          term + lane);
    }
    add(term, losses);
  }
  if (!rows.across) {
    share_sum(losses);
  }
}

// Turns the student's tile into its gradient, `scale` times the derivative of the row's loss.
template <typename V, bool kWeighted, typename Acc>
void softmax_gradients(
    const Rows& rows,
    Acc* s,
    Acc* t,
    const Acc* class_weights,
    const Temperature<Acc>& temperature,
    const Acc* derivative) {
  const SoftmaxSums sums =
      softmax_sums<V, kWeighted, true, Acc>(rows, s, t, class_weights, temperature, false);
  Acc p[kLanes], q[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    p[lane] = static_cast<Acc>(sums.weight[lane] / (sums.t_exp[lane] * sums.s_exp[lane]));
    q[lane] = static_cast<Acc>(1 / sums.t_exp[lane]);
  }
  for (int64_t i = 0; i < rows.tile_size(); i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      s[i + lane] = derivative[lane] * (s[i + lane] * p[lane] - t[i + lane] * q[lane]);
    }
  }
}

template <typename V, bool kWeighted, typename Acc>
void sigmoid_gradients(
    const Rows& rows,
    Acc* s,
    const Acc* t,
    const Acc* class_weights,
    const Temperature<Acc>& temperature,
    const Acc* derivative) {
  for (int64_t i = 0; i < rows.tile_size(); i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; lane += kWidth<V>) {
      const V difference = sigmoid_difference<V>(
          temperature.divide(load<V>(s + i + lane)), temperature.divide(load<V>(t + i + lane)));
      const V weight = kWeighted ? load<V>(class_weights + i + lane) : V{} + 1;
      store(load<V>(derivative + lane) * weight * difference, s + i + lane);
    }
  }
}

std::tuple<Tensor, Tensor> forward(
    const std::vector<Tensor>& student_logits,
    const std::vector<Tensor>& teacher_logits,
    const std::vector<Tensor>& row_weights,
    const std::optional<Tensor>& class_weights,
    const Options& options) {
  const Rows rows(student_logits, teacher_logits, row_weights, class_weights);
  const std::vector<Values> student = to_read("student_logits", rows.student),
                            teacher = to_read("teacher_logits", rows.teacher);
  std::vector<double> sums(rows.blocks.size());
  double total = 0, normalizer = 0;
  dispatch_accumulate(student_logits[0].scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const Temperature<Acc> temperature(options.temperature);
    const std::vector<Acc> class_tile = rows.class_weight_tile<Acc>(class_weights);
    const Acc* const c = class_tile.data();
    const std::vector<const Acc*> given = rows.weight_pointers<Acc>();
    const int64_t size = rows.tile_size();
    with_constant(class_weights.has_value(), [&](auto weighted) {
      for_each_block<Acc>(
          rows.blocks, 3 * size, [&](int64_t index, const Block& b, Acc* scratch, auto lanes) {
            using V = Vector<Acc, lanes.value>;
            Acc *s = scratch, *t = scratch + size, *free = scratch + 2 * size;
            Acc weights[kLanes];
            double losses[kLanes], sum[kLanes] = {};
            for (int64_t row = b.begin; row < b.end; row += rows.per_tile) {
              const int64_t count = std::min(rows.per_tile, b.end - row);
              rows.load(student[b.tensor], row, count, s, free);
              rows.load(teacher[b.tensor], row, count, t, free);
              lane_weights(given[b.tensor], row, count, weights);
              if (options.sigmoid) {
                sigmoid_losses<V, weighted.value>(rows, s, t, c, temperature, options.kl, losses);
              } else {
                softmax_losses<V, weighted.value>(rows, s, t, c, temperature, options.kl, losses);
              }
              for (int64_t lane = 0; lane < kLanes; ++lane) {
                sum[lane] += lane < count ? weights[lane] * losses[lane] : 0;
              }
            }
            share_sum(sum);
            sums[index] = sum[0];
          });
    });
    normalizer = rows.normalizer<Acc>();
    total = sum_of(sums) / normalizer;
  });
  return {
      scalar_like(student_logits[0], options.temperature * options.temperature * total),
      scalar_like(student_logits[0], normalizer)};
}

std::vector<Tensor> backward(
    const Tensor& grad,
    const Tensor& normalizer,
    const std::vector<Tensor>& student_logits,
    const std::vector<Tensor>& teacher_logits,
    const std::vector<Tensor>& row_weights,
    const std::optional<Tensor>& class_weights,
    const Options& options) {
  const Rows rows(student_logits, teacher_logits, row_weights, class_weights);
  const std::vector<Values> student = to_read("student_logits", rows.student),
                            teacher = to_read("teacher_logits", rows.teacher);
  std::vector<Tensor> gradients;
  for (const Tensor& logits : student_logits) {
    gradients.push_back(torch::stable::new_empty(logits, logits.sizes()));
  }
  const std::vector<Values> targets = to_write(gradients);
  dispatch_accumulate(student_logits[0].scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const Temperature<Acc> temperature(options.temperature);
    const double derivative =
        number_of("grad", grad) * options.temperature / number_of("normalizer", normalizer);
    const std::vector<Acc> class_tile = rows.class_weight_tile<Acc>(class_weights);
    const Acc* const c = class_tile.data();
    const std::vector<const Acc*> given = rows.weight_pointers<Acc>();
    const int64_t size = rows.tile_size();
    with_constant(class_weights.has_value(), [&](auto weighted) {
      for_each_block<Acc>(
          rows.blocks, 3 * size, [&](int64_t, const Block& b, Acc* scratch, auto lanes) {
            using V = Vector<Acc, lanes.value>;
            Acc *s = scratch, *t = scratch + size, *free = scratch + 2 * size;
            Acc scales[kLanes];
            for (int64_t row = b.begin; row < b.end; row += rows.per_tile) {
              const int64_t count = std::min(rows.per_tile, b.end - row);
              rows.load(student[b.tensor], row, count, s, free);
              rows.load(teacher[b.tensor], row, count, t, free);
              lane_weights(given[b.tensor], row, count, scales);
              if (!rows.across) {
                std::fill(scales + 1, scales + kLanes, scales[0]);
              }
              for (int64_t lane = 0; lane < kLanes; ++lane) {
                scales[lane] = static_cast<Acc>(derivative * scales[lane]);
              }
              if (options.sigmoid) {
                sigmoid_gradients<V, weighted.value>(rows, s, t, c, temperature, scales);
              } else {
                softmax_gradients<V, weighted.value>(rows, s, t, c, temperature, scales);
              }
              rows.store(s, row, count, targets[b.tensor], free);
            }
          });
    });
  });
  return gradients;
}

std::tuple<Tensor, Tensor> kl_distillation_loss_cpu(
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    double temperature,
    bool sigmoid) {
  return forward(
      student_logits, teacher_logits, weights, std::nullopt, {temperature, sigmoid, true});
}

std::vector<Tensor> kl_distillation_loss_backward_cpu(
    const Tensor& grad,
    const Tensor& normalizer,
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    double temperature,
    bool sigmoid) {
  return backward(
      grad,
      normalizer,
      student_logits,
      teacher_logits,
      weights,
      std::nullopt,
      {temperature, sigmoid, true});
}

std::tuple<Tensor, Tensor> soft_cross_entropy_loss_cpu(
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    std::optional<Tensor> class_weights,
    double temperature,
    bool sigmoid) {
  return forward(
      student_logits, teacher_logits, weights, class_weights, {temperature, sigmoid, false});
}

std::vector<Tensor> soft_cross_entropy_loss_backward_cpu(
    const Tensor& grad,
    const Tensor& normalizer,
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_logits,
    std::vector<Tensor> weights,
    std::optional<Tensor> class_weights,
    double temperature,
    bool sigmoid) {
  return backward(
      grad,
      normalizer,
      student_logits,
      teacher_logits,
      weights,
      class_weights,
      {temperature, sigmoid, false});
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, CPU, m) {
  m.impl("kl_distillation_loss", TORCH_BOX(&kl_distillation_loss_cpu));
  m.impl("kl_distillation_loss_backward", TORCH_BOX(&kl_distillation_loss_backward_cpu));
  m.impl("soft_cross_entropy_loss", TORCH_BOX(&soft_cross_entropy_loss_cpu));
  m.impl("soft_cross_entropy_loss_backward", TORCH_BOX(&soft_cross_entropy_loss_backward_cpu));
}

} // namespace hkd
