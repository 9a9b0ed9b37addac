// One box of the bounded regression loss. Needs no torch header, so that host and device share it.
#pragma once

#include <cstdint>

#include "hkd/macros.h"

namespace hkd {

template <typename Acc>
HKD_HD Acc squared_error(const Acc* deltas, const Acc* target, int64_t size) {
  Acc sum = 0;
  for (int64_t d = 0; d < size; ++d) {
    const Acc difference = deltas[d] - target[d];
    sum += difference * difference;
  }
  return sum;
}

// The squared error of the student, and whether it counts: where, plus the margin, it exceeds the
// teacher's.
template <typename Acc>
struct BoundedError {
  Acc student, teacher;
  bool counts;

  HKD_HD BoundedError(const Acc* s, const Acc* t, const Acc* target, int64_t size, Acc margin)
      : student(squared_error(s, target, size)),
        teacher(squared_error(t, target, size)),
        counts(student + margin > teacher) {
  }
};

} // namespace hkd
