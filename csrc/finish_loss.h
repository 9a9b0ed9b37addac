// The last step of a loss on the GPU: sums of blocks become a number. Needs no torch header.
//
// Acc is the type of the loss: double where `is_double`, otherwise float. Void pointers point to
// Acc on the device.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "hkd/macros.h"
#include "hkd/storage.h"

namespace hkd {

// One number: on the device, floating or int64, or known to the host.
struct DeviceNumber {
  Numbers floating; // data may be null
  const int64_t* integer;
  double value;
};

// loss = scale * sum of the first numbers of the pairs / max(denominator, 1)
struct LossSums {
  void* pairs;
  int64_t count; // of pairs
  double scale;
  bool divide_by_second; // the denominator is the sum of the pairs' second numbers
  DeviceNumber denominator;
  void* loss;             // may be null
  void* used_denominator; // max(denominator, 1), may be null

  // The block that sums is the only one, and may finish the loss itself.
  HKD_HD bool by_one_block() const {
    return count == 1;
  }
};
void finish_loss(const LossSums& sums, bool is_double, cudaStream_t stream);

} // namespace hkd
