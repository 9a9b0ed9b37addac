// RoI distillation on the GPU: arguments and results of the kernels.
//
// Memory besides tables and sums is that of the rows route, whatever the number of boxes: buffers
// of kRowsBytes for the rows of some boxes, of both sides and adapted, and backward one of four
// times that size for the gradients of the student's bins.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "finish_loss.h"
#include "roi_align/roi_arguments.h"
#include "roi_distillation/roi_distillation_arguments.h"
#include "roi_distillation/roi_distillation_kernels.h"

// Tests take less, so that small calls have several blocks of boxes.
#if !defined(HKD_ROI_ROWS_BYTES)
#define HKD_ROI_ROWS_BYTES (16 << 20)
#endif

namespace hkd {
namespace {

constexpr int64_t kRowsBytes = HKD_ROI_ROWS_BYTES;

// A call, with its table of boxes on the device.
class [[gnu::visibility("hidden")]] Call {
 public:
  Call(const RoiDistillation& given, bool gradient)
      : device(given.student[0]),
        type(given.type()),
        in_double(is_double(type)),
        student_channels(given.student_channels()),
        teacher_channels(given.teacher_channels()),
        normalizer(given.normalizer()),
        student(roi_pyramid(given.student, type)),
        teacher(roi_pyramid(given.teacher, type)),
        table(
            given.student[0],
            given.boxes,
            given.options,
            lengths(given.student, 2),
            lengths(given.student, 3),
            gradient,
            device.stream()),
        has_rows(given.by_rows()),
        like_(given.student[0]) {
    comparison.distance = given.distance;
    for (int level = 0; level < given.levels(); ++level) {
      const int64_t w = given.weight_of_level[level], b = given.bias_of_level[level];
      if (w >= 0) {
        adapters.weights[level] = given.weights[w].const_data_ptr();
        adapted = true;
      }
      if (b >= 0) {
        adapters.biases[level] = given.biases[b].const_data_ptr();
      }
      comparison.difference_levels |= uint32_t(given.by_difference(level)) << level;
    }
  }

  int64_t rois() const {
    return table.rois.count;
  }
  // Memory for values of the type that is computed in.
  Tensor values(int64_t count) const {
    return torch::stable::new_empty(like_, {count}, accumulate_type(type));
  }
  // Boxes whose rows of `width` channels fill a buffer.
  int64_t boxes_of(int64_t bytes, int64_t width) const {
    const int64_t of_box = table.sampling.bins() * std::max<int64_t>(width, 1) * value_bytes();
    return std::max<int64_t>(bytes / of_box, 1);
  }
  int64_t value_bytes() const {
    return in_double ? sizeof(double) : sizeof(float);
  }
  void* at(const Tensor& values, int64_t place) const {
    return static_cast<char*>(values.mutable_data_ptr()) + place * value_bytes();
  }

  // Calls body(range) for blocks of the boxes [begin, end).
  template <typename Body>
  void for_each_block(int64_t begin, int64_t end, int64_t size, const Body& body) const {
    for (; begin < end; begin += size) {
      body(RoiRows{begin, std::min(size, end - begin)});
    }
  }

  void pool(const RoiPyramid& pyramid, const RoiRows& range, void* rows) const {
    const Numbers numbers{rows, in_double ? Storage::kDouble : Storage::kFloat};
    if (pyramid.channels > 0) {
      roi_align(
          pyramid,
          table.sampling,
          table.rois,
          range.begin,
          range.begin + range.count,
          {numbers, pyramid.channels, 1, pyramid.channels},
          in_double,
          device.stream());
    }
  }
  void multiply(
      const void* rows,
      int64_t width_in,
      bool transposed,
      const RoiRows& range,
      void* out,
      int64_t width_out) const {
    if (width_out > 0) {
      roi_product(
          rows,
          width_in,
          adapters,
          transposed,
          table.sampling,
          table.rois,
          range,
          out,
          width_out,
          in_double,
          device.stream());
    }
  }

  DeviceCall device;
  ScalarType type; // of the student
  bool in_double;
  int64_t student_channels, teacher_channels;
  double normalizer;
  RoiPyramid student, teacher;
  RoiTable table;
  RoiComparison comparison{};
  RoiAdapters adapters{};
  bool adapted = false, has_rows;

 private:
  Tensor like_;
};

Tensor roi_distillation_loss_cuda(const RoiDistillation& given) {
  const Call call(given, false);
  const Sampling& sampling = call.table.sampling;
  const cudaStream_t stream = call.device.stream();
  const int64_t wide = std::max(call.student_channels, call.teacher_channels);
  const int64_t size = call.boxes_of(kRowsBytes, wide);
  const int64_t of_difference =
      call.comparison.difference_levels != 0
          ? roi_difference_blocks(sampling, call.student_channels, call.rois())
          : 0;
  int64_t blocks = of_difference;
  const bool has_rows = call.has_rows && call.teacher_channels > 0; // no cosine of nothing
  if (has_rows) {
    call.for_each_block(0, call.rois(), size, [&](const RoiRows& range) {
      blocks += roi_rows_blocks(sampling, range.count);
    });
  }
  const Tensor pairs = call.values(2 * blocks);
  if (of_difference > 0) {
    roi_difference(
        call.student,
        call.teacher,
        sampling,
        call.table.rois,
        call.comparison,
        pairs.mutable_data_ptr(),
        call.in_double,
        stream);
  }
  if (has_rows && call.rois() > 0) {
    const int64_t of_block = std::min(size, call.rois()) * sampling.bins();
    const Tensor s = call.values(of_block * call.student_channels);
    const Tensor t = call.values(of_block * call.teacher_channels);
    const Tensor a = call.adapted ? call.values(of_block * call.teacher_channels) : s;
    int64_t place = of_difference;
    call.for_each_block(0, call.rois(), size, [&](const RoiRows& range) {
      call.pool(call.student, range, s.mutable_data_ptr());
      call.pool(call.teacher, range, t.mutable_data_ptr());
      if (call.adapted) {
        call.multiply(
            s.const_data_ptr(),
            call.student_channels,
            false,
            range,
            a.mutable_data_ptr(),
            call.teacher_channels);
      }
      roi_rows(
          a.const_data_ptr(),
          t.const_data_ptr(),
          call.teacher_channels,
          sampling,
          call.table.rois,
          range,
          call.comparison,
          call.at(pairs, 2 * place),
          call.in_double,
          stream);
      place += roi_rows_blocks(sampling, range.count);
    });
  }
  Tensor loss = torch::stable::new_empty(given.student[0], {}, accumulate_type(call.type));
  LossSums sums{};
  sums.pairs = pairs.mutable_data_ptr();
  sums.count = blocks;
  sums.scale = 1;
  sums.denominator = {{nullptr, Storage::kFloat}, nullptr, call.normalizer};
  sums.loss = loss.mutable_data_ptr();
  finish_loss(sums, call.in_double, stream);
  return loss;
}

// Gradients of the weights, summed in the type that is computed in, and of the biases, in double.
class [[gnu::visibility("hidden")]] AdapterGradients {
 public:
  AdapterGradients(const Call& call, const RoiDistillation& given, int64_t boxes_at_once)
      : call_(call) {
    add(given.given_weights, given.weight_of_level, false);
    add(given.given_biases, given.bias_of_level, true);
    const int64_t slices = adapter_gradient_slices(std::min(boxes_at_once, call.rois()));
    for (Part& part : parts_) {
      part.partial = torch::stable::new_empty(
          part.total, {slices * part.total.numel()}, part.total.scalar_type());
    }
    sum(nullptr, nullptr, {0, 0});
  }

  // Adds those of some boxes; without boxes the sums begin.
  void sum(const void* gradients, const void* inputs, const RoiRows& range) {
    const cudaStream_t stream = call_.device.stream();
    for (const Part& part : parts_) {
      const int64_t size = part.total.numel();
      const int64_t slices = adapter_gradient_slices(range.count);
      if (size == 0) {
        continue;
      }
      if (slices > 0 && part.of_bias) {
        bias_gradient(
            gradients,
            size,
            part.levels,
            call_.table.sampling,
            call_.table.rois,
            range,
            part.partial.mutable_data_ptr<double>(),
            call_.in_double,
            stream);
      } else if (slices > 0) {
        adapter_gradient(
            gradients,
            call_.teacher_channels,
            inputs,
            call_.student_channels,
            part.levels,
            call_.table.sampling,
            call_.table.rois,
            range,
            part.partial.mutable_data_ptr(),
            call_.in_double,
            stream);
      }
      add_slices(
          part.partial.const_data_ptr(),
          slices,
          size,
          slices == 0,
          part.total.mutable_data_ptr(),
          call_.in_double || part.of_bias,
          stream);
    }
  }

  // In the dtypes of the adapters.
  std::vector<Tensor> finish(bool biases) const {
    std::vector<Tensor> gradients;
    for (const Part& part : parts_) {
      if (part.of_bias == biases) {
        gradients.push_back(torch::stable::to(part.total, part.type));
      }
    }
    return gradients;
  }

 private:
  struct Part {
    Tensor total, partial;
    ScalarType type;
    uint32_t levels; // that use it
    bool of_bias;
  };

  void add(const std::vector<Tensor>& tensors, const std::vector<int64_t>& of_level, bool of_bias) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      uint32_t levels = 0;
      for (std::size_t level = 0; level < of_level.size(); ++level) {
        levels |= uint32_t(of_level[level] == static_cast<int64_t>(i)) << level;
      }
      const std::vector<int64_t> shape(tensors[i].sizes().begin(), tensors[i].sizes().end());
      parts_.push_back(
          {torch::stable::new_empty(
               tensors[i], shape, of_bias ? ScalarType::Double : accumulate_type(call_.type)),
           Tensor(),
           tensors[i].scalar_type(),
           levels,
           of_bias});
    }
  }

  const Call& call_;
  std::vector<Part> parts_;
};

RoiDistillationGradients roi_distillation_loss_backward_cuda(
    const Tensor& grad, const RoiDistillation& given, bool deterministic) {
  Call call(given, true);
  const Sampling& sampling = call.table.sampling;
  const cudaStream_t stream = call.device.stream();
  const RoiLossScale scale{grad.const_data_ptr(), call.normalizer};
  const int64_t channels = call.student_channels, width = call.teacher_channels;
  const int64_t size = call.boxes_of(kRowsBytes, std::max(channels, width));
  // Whole blocks of boxes, so that one fits in what another has filled.
  const int64_t of_gather =
      std::max<int64_t>(call.boxes_of(4 * kRowsBytes, channels) / size, 1) * size;

  // Where several gathers add to one gradient, half precision is rounded after the last.
  const bool in_one = !call.has_rows || call.rois() <= of_gather;
  const ScalarType type = in_one ? call.type : accumulate_type(call.type);
  std::vector<bool> channels_last;
  for (int level = 0; level < given.levels(); ++level) {
    channels_last.push_back(call.student.maps[level].channels_last);
  }
  PyramidGradients gradients(given.student[0], type, sampling, channels, channels_last);
  bool by_difference[kMaxLevels], by_rows[kMaxLevels];
  for (int level = 0; level < kMaxLevels; ++level) {
    by_difference[level] = call.comparison.by_difference(level);
    by_rows[level] = !by_difference[level];
  }

  const bool scatter = scatters(call.type, deterministic);
  if (scatter) {
    gradients.clear();
  }
  RoiGradients of_difference = gradients.kernels;
  set_gradient_blocks(sampling, by_difference, &of_difference);
  if (scatter && call.comparison.difference_levels != 0 && call.rois() > 0 && channels > 0) {
    roi_difference_scatter(
        of_difference.pyramid,
        call.student,
        call.teacher,
        sampling,
        call.table.rois,
        call.comparison,
        scale,
        stream);
  } else if (!scatter && of_difference.blocks > 0) {
    roi_difference_backward(
        of_difference,
        call.student,
        call.teacher,
        sampling,
        call.table.rois,
        call.table.groups(0, call.rois()),
        call.comparison,
        scale,
        call.in_double,
        stream);
  }

  AdapterGradients adapters(call, given, size);
  RoiGradients of_rows = gradients.kernels;
  set_gradient_blocks(sampling, by_rows, &of_rows);
  if (call.has_rows) {
    const int64_t of_block = std::min(size, call.rois()) * sampling.bins();
    const Tensor t = call.values(of_block * width);
    const Tensor s = call.adapted ? call.values(of_block * channels) : t;
    const Tensor a = call.adapted ? call.values(of_block * width) : t;
    const Tensor bins = call.values(std::min(of_gather, call.rois()) * sampling.bins() * channels);
    int64_t begin = 0;
    do { // without boxes once, for the zeros
      const int64_t end = std::min(begin + of_gather, call.rois());
      call.for_each_block(begin, end, size, [&](const RoiRows& range) {
        void* own = call.at(bins, (range.begin - begin) * sampling.bins() * channels);
        void* pooled = call.adapted ? s.mutable_data_ptr() : own;
        void* compared = call.adapted ? a.mutable_data_ptr() : own;
        call.pool(call.student, range, pooled);
        call.pool(call.teacher, range, t.mutable_data_ptr());
        if (call.adapted) {
          call.multiply(pooled, channels, false, range, compared, width);
        }
        roi_rows_backward(
            compared,
            t.const_data_ptr(),
            width,
            sampling,
            call.table.rois,
            range,
            call.comparison,
            scale,
            call.in_double,
            stream);
        if (call.adapted) {
          adapters.sum(compared, pooled, range);
          call.multiply(compared, width, true, range, own, channels);
        }
      });
      const Bins of_bins{
          {bins.mutable_data_ptr(), call.in_double ? Storage::kDouble : Storage::kFloat},
          channels,
          1,
          channels};
      if (scatter && end > begin && channels > 0) {
        roi_align_scatter(
            of_rows.pyramid,
            ~call.comparison.difference_levels,
            sampling,
            call.table.rois,
            of_bins,
            begin,
            end,
            stream);
      } else if (!scatter && of_rows.blocks > 0) {
        roi_align_backward(
            of_rows,
            sampling,
            call.table.rois,
            call.table.groups(begin, end),
            of_bins,
            begin,
            call.in_double,
            stream);
      }
      // What follows is added to what is there.
      of_rows.adds = true;
      begin = end;
    } while (begin < call.rois());
  }
  if (type != call.type) {
    for (Tensor& gradient : gradients.tensors) {
      gradient = torch::stable::to(gradient, call.type);
    }
  }
  return {std::move(gradients.tensors), adapters.finish(false), adapters.finish(true)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, HKD_DEVICE, m) {
  m.impl("roi_distillation_loss", TORCH_BOX(&roi_distillation_loss<roi_distillation_loss_cuda>));
  m.impl(
      "roi_distillation_loss_backward",
      TORCH_BOX(&roi_distillation_loss_backward<roi_distillation_loss_backward_cuda>));
}

} // namespace hkd
