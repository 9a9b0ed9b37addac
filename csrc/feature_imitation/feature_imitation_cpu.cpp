// Feature imitation on the CPU: from tensors to the work of imitation.h and back.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "feature_imitation/cell_weights.h"
#include "feature_imitation/imitation.h"
#include "feature_imitation/imitation_arguments.h"

namespace hkd {
namespace {

// Gradients of this size are not kept by the caches until they are read, so they go past them.
constexpr int64_t kStreamedBytes = 4 << 20;

template <typename Acc>
std::vector<Acc> numbers(const Tensor& tensor) {
  const Tensor stored = torch::stable::contiguous(tensor);
  std::vector<Acc> values(stored.numel());
  load_numbers(
      values.data(),
      static_cast<const char*>(stored.const_data_ptr()),
      stored.scalar_type(),
      stored.numel());
  return values;
}

template <typename Acc>
std::vector<AdapterPart<Acc>> adapter_parts(const Tensors& tensors, bool backward) {
  std::vector<AdapterPart<Acc>> parts;
  for (const Tensor& tensor : tensors) {
    parts.push_back({numbers<Acc>(tensor), std::vector<double>(backward ? tensor.numel() : 0)});
  }
  return parts;
}

// What forward and backward have in common. Keeps alive what the levels point to.
template <typename Acc>
struct Call {
  Tensors student, teacher;
  std::vector<std::vector<Acc>> channel_weights;
  Imitation<Acc> imitation;

  Call(
      const Tensors& student_maps,
      const Tensors& teacher_maps,
      const Tensors& adapter_weights,
      const Tensors& adapter_biases,
      const Tensors& channels,
      const std::vector<int64_t>& weight_of_level,
      const std::vector<int64_t>& bias_of_level,
      Distance distance,
      bool backward)
      : student(as_stored(student_maps)), teacher(as_stored(teacher_maps)), imitation(distance) {
    imitation.weights = adapter_parts<Acc>(adapter_weights, backward);
    imitation.biases = adapter_parts<Acc>(adapter_biases, backward);
    for (const Tensor& weights : channels) {
      channel_weights.push_back(numbers<Acc>(weights));
    }
    for (size_t l = 0; l < student.size(); ++l) {
      ImitationLevel<Acc> level;
      level.student = AnyMap(student[l]);
      level.teacher = AnyMap(teacher[l]);
      level.channel_weights = channels.empty() ? nullptr : channel_weights[l].data();
      level.weight = static_cast<int>(weight_of_level[l]);
      level.bias = static_cast<int>(bias_of_level[l]);
      imitation.levels.push_back(level);
    }
  }
};

// What paints the mask weights of an image on a level, and gives their sum.
struct Mask {
  const Tensors& boxes;
  const Tensors& ignore_boxes;
  const Tensors& anchors;
  const std::vector<double>& strides;
  std::vector<float> log2_strides;
  CellWeightRule rule;
  bool assign_ignore_all;

  template <typename T>
  std::vector<Box<T>> chosen(const Tensor& boxes, int level) const {
    const std::vector<T> values = numbers<T>(boxes);
    return boxes_of_level(values.data(), boxes.size(0), level, log2_strides);
  }

  double paint_image(const Canvas& canvas, int64_t image, int level) const {
    std::fill_n(canvas.weights, canvas.height * canvas.width, -1.0f);
    const auto in_their_type = [](const Tensor& tensor, const auto& body) {
      if (tensor.scalar_type() == ScalarType::Double) {
        body(double{});
      } else {
        body(float{});
      }
    };
    if (!boxes.empty()) {
      in_their_type(boxes[image], [&](auto t) {
        using T = decltype(t);
        const auto shapes = anchors.empty() ? std::vector<T>() : numbers<T>(anchors[level]);
        paint_boxes(canvas, chosen<T>(boxes[image], level), shapes, rule);
      });
    }
    if (!ignore_boxes.empty()) {
      in_their_type(ignore_boxes[image], [&](auto t) {
        using T = decltype(t);
        paint_ignored(canvas, chosen<T>(ignore_boxes[image], assign_ignore_all ? -1 : level), rule);
      });
    }
    return paint_background(canvas, rule);
  }
};

std::tuple<Tensor, Tensors> feature_imitation_loss_cpu(
    Tensors student,
    Tensors teacher,
    Tensors adapter_weights,
    Tensors adapter_biases,
    Tensors boxes,
    Tensors ignore_boxes,
    Tensors anchors,
    Tensors spatial_weights,
    Tensors channel_weights,
    std::optional<Tensor> level_weights,
    std::vector<int64_t> weight_of_level,
    std::vector<int64_t> bias_of_level,
    std::vector<double> strides,
    int64_t distance_code,
    bool masked,
    double foreground_weight,
    double background_weight,
    bool area_weights,
    bool assign_ignore_all,
    int64_t rasterize_code,
    double anchor_offset,
    double anchor_threshold) {
  check_maps(
      student,
      teacher,
      adapter_weights,
      adapter_biases,
      channel_weights,
      weight_of_level,
      bias_of_level);
  const int64_t levels = student.size(), images = student[0].size(0);
  check_options(
      student,
      boxes,
      ignore_boxes,
      anchors,
      spatial_weights,
      level_weights,
      strides,
      distance_code,
      rasterize_code);
  const Distance distance = static_cast<Distance>(distance_code);

  Mask mask = {boxes, ignore_boxes, anchors, strides, {}, {}, assign_ignore_all};
  mask.rule = {
      static_cast<Rasterize>(rasterize_code),
      area_weights,
      static_cast<float>(foreground_weight),
      static_cast<float>(background_weight),
      anchor_offset,
      anchor_threshold};
  mask.log2_strides = log2_of(strides);

  const ScalarType type = accumulate_type(student[0].scalar_type());
  Tensor loss = torch::stable::new_empty(student[0], {}, type);
  Tensors saved;
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    Call<Acc> call(
        student,
        teacher,
        adapter_weights,
        adapter_biases,
        channel_weights,
        weight_of_level,
        bias_of_level,
        distance,
        /*backward=*/false);
    auto& of_level = call.imitation.levels;

    // Cell weights, which backward reads again unless cosine puts them into its factors.
    std::vector<std::vector<double>> totals(levels, std::vector<double>(images));
    Tensors cell_weights;
    for (int64_t l = 0; l < levels; ++l) {
      const int64_t height = student[l].size(2), width = student[l].size(3);
      if (masked || !spatial_weights.empty()) {
        cell_weights.push_back(torch::stable::new_empty(student[l], {images, height, width}, type));
        of_level[l].cell_weights = cell_weights[l].template const_data_ptr<Acc>();
      } else {
        totals[l].assign(images, static_cast<double>(height * width));
      }
    }
    const std::vector<Tensor> attention = [&] {
      Tensors stored;
      for (const Tensor& weights : spatial_weights) {
        stored.push_back(torch::stable::contiguous(weights));
      }
      return stored;
    }();
    for_each_worker(cell_weights.empty() ? 0 : levels * images, [&](int64_t, const auto& next) {
      std::vector<float> painted;
      std::vector<Acc> factors;
      for (int64_t unit = next(); unit >= 0; unit = next()) {
        const int64_t l = unit / images, image = unit % images;
        const int64_t height = student[l].size(2), width = student[l].size(3);
        const int64_t cells = height * width;
        Acc* weights = cell_weights[l].template mutable_data_ptr<Acc>() + image * cells;
        if (masked) {
          painted.resize(cells);
          const Canvas canvas = {painted.data(), height, width, strides.empty() ? 1.0 : strides[l]};
          totals[l][image] = mask.paint_image(canvas, image, static_cast<int>(l));
          std::copy(painted.begin(), painted.end(), weights);
        } else {
          totals[l][image] = static_cast<double>(cells);
          std::fill_n(weights, cells, Acc(1));
        }
        if (!attention.empty()) {
          factors.resize(cells);
          const char* from = static_cast<const char*>(attention[l].const_data_ptr());
          load_numbers(
              factors.data(),
              from + image * cells * attention[l].element_size(),
              attention[l].scalar_type(),
              cells);
          for (int64_t i = 0; i < cells; ++i) {
            weights[i] *= factors[i];
          }
        }
      }
    });

    Tensor scales = torch::stable::new_empty(student[0], {levels}, ScalarType::Double);
    double* const scale = scales.template mutable_data_ptr<double>();
    const auto factors = level_weights ? numbers<double>(*level_weights) : std::vector<double>();
    for (int64_t l = 0; l < levels; ++l) {
      const int64_t channels = teacher[l].size(1), height = student[l].size(2),
                    width = student[l].size(3);
      double terms = distance == Distance::kPkd
                         ? images * height * width > 0
                         : std::accumulate(totals[l].begin(), totals[l].end(), 0.0);
      terms *= distance == Distance::kCosine ? channels > 0 : static_cast<double>(channels);
      // No active cell: 0.
      scale[l] = terms > 0 ? (level_weights ? factors[l] : 1.0) / (levels * terms) : 0.0;
      of_level[l].scale = scale[l];
      if (distance == Distance::kCosine) {
        saved.push_back(torch::stable::new_empty(student[l], {2, images, height, width}, type));
      } else if (distance == Distance::kPkd) {
        saved.push_back(torch::stable::new_zeros(student[l], {4, channels}, type));
      } else if (!cell_weights.empty()) {
        saved.push_back(cell_weights[l]);
      } else {
        saved.push_back(torch::stable::new_empty(student[l], {0}, type));
      }
      if (distance == Distance::kCosine || distance == Distance::kPkd) {
        of_level[l].coefficients = saved[l].template mutable_data_ptr<Acc>();
      }
    }
    saved.push_back(scales);
    *loss.template mutable_data_ptr<Acc>() = static_cast<Acc>(call.imitation.forward());
  };
  if (type == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {loss, saved};
}

std::tuple<Tensors, Tensors, Tensors> feature_imitation_loss_backward_cpu(
    Tensor grad,
    Tensors student,
    Tensors teacher,
    Tensors adapter_weights,
    Tensors adapter_biases,
    Tensors channel_weights,
    Tensors saved,
    std::vector<int64_t> weight_of_level,
    std::vector<int64_t> bias_of_level,
    int64_t distance_code) {
  check_maps(
      student,
      teacher,
      adapter_weights,
      adapter_biases,
      channel_weights,
      weight_of_level,
      bias_of_level);
  const size_t levels = student.size();
  const ScalarType type = accumulate_type(student[0].scalar_type());
  const Distance distance = static_cast<Distance>(distance_code);
  check_backward(grad, student, teacher, saved, distance_code);

  Tensors gradients, weight_gradients, bias_gradients;
  const auto run = [&](auto acc) {
    using Acc = decltype(acc);
    Call<Acc> call(
        student,
        teacher,
        adapter_weights,
        adapter_biases,
        channel_weights,
        weight_of_level,
        bias_of_level,
        distance,
        /*backward=*/true);
    const double upstream = *grad.const_data_ptr<Acc>();
    for (size_t l = 0; l < levels; ++l) {
      ImitationLevel<Acc>& level = call.imitation.levels[l];
      gradients.push_back(torch::stable::empty_like(call.student[l]));
      level.gradient.map = AnyMap(gradients[l]);
      level.gradient.streamed =
          gradients[l].numel() * static_cast<int64_t>(gradients[l].element_size()) >=
          kStreamedBytes;
      level.scale = upstream * saved[levels].const_data_ptr<double>()[l];
      if (distance == Distance::kCosine || distance == Distance::kPkd) {
        level.coefficients = const_cast<Acc*>(saved[l].template const_data_ptr<Acc>());
      } else if (saved[l].numel() > 0) {
        level.cell_weights = saved[l].template const_data_ptr<Acc>();
      }
    }
    call.imitation.backward();
    const auto converted = [](const Tensor& like, const std::vector<double>& values) {
      Tensor out = torch::stable::new_empty(like, like.sizes());
      dispatch_floating(out.scalar_type(), "The adapter", [&](auto t) {
        using T = decltype(t);
        convert(out.template mutable_data_ptr<T>(), values.data(), values.size());
      });
      return out;
    };
    for (size_t i = 0; i < adapter_weights.size(); ++i) {
      weight_gradients.push_back(converted(adapter_weights[i], call.imitation.weights[i].gradient));
    }
    for (size_t i = 0; i < adapter_biases.size(); ++i) {
      bias_gradients.push_back(converted(adapter_biases[i], call.imitation.biases[i].gradient));
    }
  };
  if (type == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {gradients, weight_gradients, bias_gradients};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, CPU, m) {
  m.impl("feature_imitation_loss", TORCH_BOX(&feature_imitation_loss_cpu));
  m.impl("feature_imitation_loss_backward", TORCH_BOX(&feature_imitation_loss_backward_cpu));
}

} // namespace hkd
