// Feature imitation on the GPU: arguments and results of the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "device_call.h"
#include "feature_imitation/imitation_arguments.h"
#include "feature_imitation/imitation_kernels.h"
#include "feature_maps.h"

namespace hkd {
namespace {

StoredMap stored_map(const char* name, const Tensor& map) {
  StoredMap stored{};
  stored.numbers = numbers_to_read(name, map);
  stored.channels = static_cast<int32_t>(map.size(1));
  stored.channels_last = !map.is_contiguous();
  const int64_t neighbours = stored.channels_last ? map.size(1) : map.size(2) * map.size(3);
  stored.aligned =
      neighbours % 4 == 0 &&
      reinterpret_cast<uintptr_t>(map.const_data_ptr()) % (4 * map.element_size()) == 0;
  return stored;
}

// What forward and backward have in common. Keeps alive what the levels point to; the memory may be
// used again when kernels that were launched later run.
struct Call {
  Tensors student, teacher, kept;
  ImitationLevels table{};
  Distance distance;
  ScalarType type; // of the loss
  bool is_double;

  Call(
      const Tensors& student_maps,
      const Tensors& teacher_maps,
      const Tensors& adapter_weights,
      const Tensors& adapter_biases,
      const Tensors& channel_weights,
      const std::vector<int64_t>& weight_of_level,
      const std::vector<int64_t>& bias_of_level,
      int64_t distance_code)
      : student(as_stored(student_maps)),
        teacher(as_stored(teacher_maps)),
        distance(static_cast<Distance>(distance_code)),
        type(accumulate_type(student_maps[0].scalar_type())),
        is_double(type == ScalarType::Double) {
    check(student.size() <= kMaxLevels, "the GPU's operator takes at most 12 levels.");
    table.count = static_cast<int32_t>(student.size());
    Tensors weights, biases; // contiguous
    for (const Tensor& weight : adapter_weights) {
      weights.push_back(contiguous(weight));
    }
    for (const Tensor& bias : adapter_biases) {
      biases.push_back(contiguous(bias));
    }
    for (size_t l = 0; l < student.size(); ++l) {
      ImitationLevel& level = table.levels[l];
      level.student = stored_map("student", student[l]);
      level.teacher = stored_map("teacher", teacher[l]);
      level.cells = student[l].size(2) * student[l].size(3);
      level.images = static_cast<int32_t>(student[l].size(0));
      check(
          level.images * level.cells < std::numeric_limits<int32_t>::max(),
          "the GPU's operator takes less than 2^31 cells a level.");
      level.channel_lanes = static_cast<int32_t>(channel_lanes(level.student, level.teacher));
      level.adapted = weight_of_level[l] >= 0;
      if (level.adapted) {
        level.weight = numbers_to_read("The adapter", weights[weight_of_level[l]]);
      }
      if (bias_of_level[l] >= 0) {
        level.bias = numbers_to_read("The adapter", biases[bias_of_level[l]]);
      }
      if (!channel_weights.empty()) {
        level.channel_weights = numbers_to_read("channel_weights", contiguous(channel_weights[l]));
      }
    }
  }

  Tensor contiguous(const Tensor& tensor) {
    kept.push_back(torch::stable::contiguous(tensor));
    return kept.back();
  }

  template <typename T>
  T* scratch(std::vector<int64_t> shape, ScalarType of) {
    kept.push_back(torch::stable::new_empty(student[0], shape, of));
    return static_cast<T*>(kept.back().mutable_data_ptr());
  }

  // Lists the active cells on adapted levels. `others(level)` as in ListedLevel.
  template <typename Weights, typename Others>
  void list_active(const Weights& weights, const Others& others, cudaStream_t stream) {
    ListedLevels listed{};
    for (int l = 0; l < table.count; ++l) {
      ImitationLevel& level = table.levels[l];
      const int64_t cells = level.images * level.cells;
      if (!level.adapted || weights(level) == nullptr || cells == 0) {
        continue;
      }
      ListedLevel& list = listed.levels[listed.count++];
      list.weights = weights(level);
      list.others = others(level);
      list.cells = cells;
      list.blocks = scratch<int32_t>({listed_blocks(cells)}, ScalarType::Int);
      list.list = scratch<int32_t>({cells}, ScalarType::Int);
      list.length = scratch<int32_t>({1}, ScalarType::Int);
      level.active = {list.list, list.length};
    }
    list_cells(listed, is_double, stream);
  }
};

// Paints the weights of cells, which `weights` are made for, and notes where their sums are.
void paint(
    Call& call,
    const Tensors& weights,
    const Tensors& boxes,
    const Tensors& ignore_boxes,
    const Tensors& anchors,
    const Tensors& spatial_weights,
    const std::vector<double>& strides,
    PaintedLevels& painted,
    cudaStream_t stream) {
  const int64_t images = call.student[0].size(0);
  int64_t all_boxes = 0;
  for (const Tensor& image : boxes) {
    all_boxes += image.size(0);
  }
  const std::vector<float> log2_strides = log2_of(strides);
  std::copy(log2_strides.begin(), log2_strides.end(), painted.log2_strides);
  painted.count = call.table.count;
  for (int l = 0; l < painted.count; ++l) {
    PaintedLevel& level = painted.levels[l];
    level.weights = numbers_to_write(weights[l]);
    if (!spatial_weights.empty()) {
      level.attention = numbers_to_read("spatial_weights", call.contiguous(spatial_weights[l]));
    }
    level.stride = strides.empty() ? 1.0 : strides[l];
    level.height = static_cast<int32_t>(call.student[l].size(2));
    level.width = static_cast<int32_t>(call.student[l].size(3));
    if (!anchors.empty()) {
      level.anchors = numbers_to_read("anchors", call.contiguous(anchors[l]));
      level.anchors_count = static_cast<int32_t>(anchors[l].size(0));
      level.least = call.scratch<double>({all_boxes}, ScalarType::Double);
    }
    const int64_t sums = images * painted_blocks(level);
    level.sums = call.scratch<double>({sums}, ScalarType::Double);
    call.table.levels[l].painted = level.sums;
    call.table.levels[l].painted_count = sums;
  }
  int32_t first_box = 0;
  for (int64_t first = 0; first < images; first += kMaxImages) {
    PaintedImages table{};
    table.first = static_cast<int32_t>(first);
    table.count = static_cast<int32_t>(std::min<int64_t>(kMaxImages, images - first));
    for (int i = 0; i < table.count; ++i) {
      PaintedImage& image = table.images[i];
      image.first = first_box;
      if (!boxes.empty()) {
        image.boxes = numbers_to_read("boxes", call.contiguous(boxes[first + i]));
        image.count = static_cast<int32_t>(boxes[first + i].size(0));
        first_box += image.count;
      }
      if (!ignore_boxes.empty()) {
        image.ignored = numbers_to_read("ignore_boxes", call.contiguous(ignore_boxes[first + i]));
        image.ignored_count = static_cast<int32_t>(ignore_boxes[first + i].size(0));
      }
    }
    paint_cells(painted, table, stream);
  }
}

std::tuple<Tensor, Tensors> feature_imitation_loss_cuda(
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
  const DeviceCall device(student[0]);
  Call call(
      student,
      teacher,
      adapter_weights,
      adapter_biases,
      channel_weights,
      weight_of_level,
      bias_of_level,
      distance_code);
  const int64_t levels = student.size(), images = student[0].size(0);
  const bool cosine = call.distance == Distance::kCosine, pkd = call.distance == Distance::kPkd;

  // Cell weights, which backward reads again unless cosine puts them into its factors.
  Tensors cell_weights;
  if (masked || !spatial_weights.empty()) {
    for (int64_t l = 0; l < levels; ++l) {
      cell_weights.push_back(
          torch::stable::new_empty(
              student[l], {images, student[l].size(2), student[l].size(3)}, call.type));
      call.table.levels[l].cell_weights = cell_weights[l].const_data_ptr();
    }
    PaintedLevels painted{};
    painted.rule = {
        static_cast<Rasterize>(rasterize_code),
        area_weights,
        static_cast<float>(foreground_weight),
        static_cast<float>(background_weight),
        anchor_offset,
        anchor_threshold};
    painted.masked = masked;
    painted.assign_ignore_all = assign_ignore_all;
    paint(
        call,
        cell_weights,
        boxes,
        ignore_boxes,
        anchors,
        spatial_weights,
        strides,
        painted,
        device.stream());
    call.list_active(
        [](const ImitationLevel& level) { return level.cell_weights; },
        [](const ImitationLevel&) { return nullptr; },
        device.stream());
  }

  Tensors saved;
  for (int64_t l = 0; l < levels; ++l) {
    ImitationLevel& level = call.table.levels[l];
    const int64_t channels = level.teacher.channels;
    if (cosine) {
      // Of adapted levels the active cells are written alone.
      const std::vector<int64_t> shape = {2, images, student[l].size(2), student[l].size(3)};
      saved.push_back(
          level.adapted ? torch::stable::new_zeros(student[l], shape, call.type)
                        : torch::stable::new_empty(student[l], shape, call.type));
    } else if (pkd) {
      saved.push_back(torch::stable::new_empty(student[l], {4, channels}, call.type));
    } else if (!cell_weights.empty()) {
      saved.push_back(cell_weights[l]);
    } else {
      saved.push_back(torch::stable::new_empty(student[l], {0}, call.type));
    }
    if (cosine || pkd) {
      level.coefficients = saved[l].mutable_data_ptr();
    }
    if (pkd) {
      level.moment_parts = level.adapted ? adapted_moment_parts(level) : moment_parts(level);
      level.moments =
          call.scratch<void>({level.moment_parts, channels, kNumbersOfMoments}, call.type);
    }
    level.sum_count = pkd             ? channels
                      : level.adapted ? adapted_distance_sums(level)
                                      : distance_sums(level);
    level.sums = call.scratch<void>({level.sum_count}, call.type);
  }
  Tensor scales = torch::stable::new_empty(student[0], {levels}, ScalarType::Double);
  saved.push_back(scales);
  Tensor loss = torch::stable::new_empty(student[0], {}, call.type);

  distances(call.table, call.distance, call.is_double, device.stream());
  adapted_distances(call.table, call.distance, call.is_double, device.stream());
  if (pkd) {
    correlate(call.table, call.is_double, device.stream());
  }
  LossOfLevels result{};
  if (level_weights) {
    result.level_weights = numbers_to_read("level_weights", call.contiguous(*level_weights));
  }
  result.scales = scales.mutable_data_ptr<double>();
  result.loss = loss.mutable_data_ptr();
  finish_imitation(call.table, result, call.distance, call.is_double, device.stream());
  return {loss, saved};
}

std::tuple<Tensors, Tensors, Tensors> feature_imitation_loss_backward_cuda(
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
  check_backward(grad, student, teacher, saved, distance_code);
  const DeviceCall device(student[0]);
  Call call(
      student,
      teacher,
      adapter_weights,
      adapter_biases,
      channel_weights,
      weight_of_level,
      bias_of_level,
      distance_code);
  const size_t levels = student.size();
  const bool cosine = call.distance == Distance::kCosine, pkd = call.distance == Distance::kPkd;

  Tensors map_gradients;
  int64_t pitch = 0;
  for (size_t l = 0; l < levels; ++l) {
    ImitationLevel& level = call.table.levels[l];
    map_gradients.push_back(torch::stable::empty_like(call.student[l]));
    const StoredMap gradient = stored_map("the gradient", map_gradients[l]);
    level.gradient = gradient.numbers;
    level.student.aligned = level.student.aligned && gradient.aligned;
    if (cosine || pkd) {
      level.coefficients = const_cast<void*>(saved[l].const_data_ptr());
    } else if (saved[l].numel() > 0) {
      level.cell_weights = saved[l].const_data_ptr();
    }
    if (level.adapted) {
      pitch = std::max<int64_t>(pitch, level.teacher.channels);
      level.splits = splits_of_weight(level);
      // Inactive cells are written in the layout of the student's map.
      level.channel_lanes = static_cast<int32_t>(channel_lanes(level.student, level.student));
    }
  }
  const size_t cells_bytes = call.is_double ? sizeof(double) : sizeof(float);
  call.list_active(
      [&](const ImitationLevel& level) -> const void* {
        return cosine ? level.coefficients : level.cell_weights;
      },
      [&](const ImitationLevel& level) -> const void* {
        const int64_t cells = level.images * level.cells;
        return cosine ? static_cast<const char*>(level.coefficients) + cells * cells_bytes
                      : nullptr;
      },
      device.stream());

  // The sums of levels that share an adapter follow each other.
  Tensors weight_gradients, bias_gradients;
  std::vector<AdapterSums> adapters;
  const auto make_sums = [&](const Tensors& tensors,
                             const std::vector<int64_t>& place_of_level,
                             void* ImitationLevel::* sums,
                             Tensors& gradients) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      AdapterSums adapter{};
      adapter.size = tensors[i].numel();
      for (size_t l = 0; l < levels; ++l) {
        adapter.count +=
            place_of_level[l] == static_cast<int64_t>(i) ? call.table.levels[l].splits : 0;
      }
      call.kept.push_back(
          torch::stable::new_zeros(student[0], {adapter.count, adapter.size}, call.type));
      char* place = static_cast<char*>(call.kept.back().mutable_data_ptr());
      adapter.sums = place;
      for (size_t l = 0; l < levels; ++l) {
        if (place_of_level[l] == static_cast<int64_t>(i)) {
          call.table.levels[l].*sums = place;
          place += call.table.levels[l].splits * adapter.size * cells_bytes;
        }
      }
      gradients.push_back(torch::stable::new_empty(tensors[i], tensors[i].sizes()));
      adapter.gradient = numbers_to_write(gradients.back());
      adapters.push_back(adapter);
    }
  };
  make_sums(adapter_weights, weight_of_level, &ImitationLevel::weight_sums, weight_gradients);
  make_sums(adapter_biases, bias_of_level, &ImitationLevel::bias_sums, bias_gradients);

  const ImitationScale scale = {grad.const_data_ptr(), saved[levels].const_data_ptr<double>()};
  gradients(call.table, scale, call.distance, call.is_double, device.stream());
  void* adapted = call.scratch<void>({rows_at_once(call.table), pitch}, call.type);
  adapted_gradients(
      call.table, scale, call.distance, adapted, pitch, call.is_double, device.stream());
  finish_adapters(adapters.data(), adapters.size(), call.is_double, device.stream());
  return {map_gradients, weight_gradients, bias_gradients};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, HKD_DEVICE, m) {
  m.impl("feature_imitation_loss", TORCH_BOX(&feature_imitation_loss_cuda));
  m.impl("feature_imitation_loss_backward", TORCH_BOX(&feature_imitation_loss_backward_cuda));
}

} // namespace hkd
