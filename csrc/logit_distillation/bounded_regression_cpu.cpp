// Bounded box regression on the CPU, forward and backward.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "hkd/bounded_regression.h"
#include "tensor_list.h"

namespace hkd {
namespace {

// Boxes of one block; a chunk of them, 1024 deltas or one box, is in the first-level cache.
constexpr int64_t kBlock = 4096;

struct Boxes {
  Tensor student, teacher, target;
  int64_t count, size, per_chunk;

  Boxes(const Tensor& student_deltas, const Tensor& teacher_deltas, const Tensor& target_deltas)
      : student(torch::stable::contiguous(student_deltas)),
        teacher(torch::stable::contiguous(teacher_deltas)),
        target(torch::stable::contiguous(target_deltas)),
        count(student.dim() == 2 ? student.size(0) : 0),
        size(student.dim() == 2 ? student.size(1) : 0),
        per_chunk(std::max<int64_t>(1, 1024 / std::max<int64_t>(1, size))) {
    STD_TORCH_CHECK(student.dim() == 2, "student_deltas must have shape (R, D).");
    check_list("student_deltas", {student}, {student});
    check_list("teacher_deltas", {teacher}, {student});
    check_list("target_deltas", {target}, {student});
  }

  // Calls body(block, first box, boxes, student, teacher, target, free scratch) for every chunk.
  template <typename Acc, typename Body>
  void for_each_chunk(const Body& body) const {
    const Values s = Values::to_read("student_deltas", student),
                 t = Values::to_read("teacher_deltas", teacher),
                 y = Values::to_read("target_deltas", target);
    const int64_t room = per_chunk * std::max<int64_t>(1, size);
    for_each_block<Acc>(
        cut_into_blocks({count}, kBlock),
        4 * room,
        [&](int64_t index, const Block& block, Acc* scratch, auto) {
          for (int64_t begin = block.begin; begin < block.end; begin += per_chunk) {
            const int64_t boxes = std::min(per_chunk, block.end - begin);
            const int64_t first = begin * size, numbers = boxes * size;
            body(
                index,
                begin,
                boxes,
                s.read(first, numbers, scratch),
                t.read(first, numbers, scratch + room),
                y.read(first, numbers, scratch + 2 * room),
                scratch + 3 * room);
          }
        });
  }
};

// Calls body with the number of deltas a box, 4 as a constant.
template <typename Body>
void with_size(int64_t size, const Body& body) {
  size == 4 ? body(std::integral_constant<int64_t, 4>()) : body(size);
}

double denominator(const std::optional<Tensor>& normalizer, double number) {
  return at_least_one(normalizer ? number_of("normalizer", *normalizer) : number);
}

Tensor bounded_regression_loss_cpu(
    const Tensor& student_deltas,
    const Tensor& teacher_deltas,
    const Tensor& target_deltas,
    double margin,
    std::optional<Tensor> normalizer,
    double number) {
  const Boxes boxes(student_deltas, teacher_deltas, target_deltas);
  std::vector<double> sums(cut_into_blocks({boxes.count}, kBlock).size());
  dispatch_accumulate(student_deltas.scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const Acc slack = static_cast<Acc>(margin);
    boxes.for_each_chunk<Acc>([&](int64_t block,
                                  int64_t,
                                  int64_t count,
                                  const Acc* student,
                                  const Acc* teacher,
                                  const Acc* target,
                                  Acc* errors) {
      with_size(boxes.size, [&](auto size) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = r * size;
          const BoundedError<Acc> error(student + at, teacher + at, target + at, size, slack);
          errors[r] = error.counts ? error.student : Acc(0);
        }
      });
      sums[block] += sum_of(errors, count);
    });
  });
  return scalar_like(student_deltas, sum_of(sums) / denominator(normalizer, number));
}

Tensor bounded_regression_loss_backward_cpu(
    const Tensor& grad,
    const Tensor& student_deltas,
    const Tensor& teacher_deltas,
    const Tensor& target_deltas,
    double margin,
    std::optional<Tensor> normalizer,
    double number) {
  const Boxes boxes(student_deltas, teacher_deltas, target_deltas);
  const double scale = 2 * number_of("grad", grad) / denominator(normalizer, number);
  Tensor gradient = torch::stable::new_empty(student_deltas, {boxes.count, boxes.size});
  const Values values = Values::to_write(gradient);
  dispatch_accumulate(student_deltas.scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const Acc slack = static_cast<Acc>(margin), factor = static_cast<Acc>(scale);
    boxes.for_each_chunk<Acc>([&](int64_t,
                                  int64_t begin,
                                  int64_t count,
                                  const Acc* student,
                                  const Acc* teacher,
                                  const Acc* target,
                                  Acc* result) {
      with_size(boxes.size, [&](auto size) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = r * size;
          const BoundedError<Acc> error(student + at, teacher + at, target + at, size, slack);
          for (int64_t d = 0; d < size; ++d) {
            const Acc gradient = factor * (student[at + d] - target[at + d]);
            result[at + d] = error.counts ? gradient : Acc(0);
          }
        }
      });
      values.write(result, begin * boxes.size, count * boxes.size);
    });
  });
  return gradient;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, CPU, m) {
  m.impl("bounded_regression_loss", TORCH_BOX(&bounded_regression_loss_cpu));
  m.impl("bounded_regression_loss_backward", TORCH_BOX(&bounded_regression_loss_backward_cpu));
}

} // namespace hkd
