// The last step of a loss: the blocks' sums, added up by one block in double.
#include "logit_distillation/logit_kernels.cuh"

namespace hkd {
namespace {

template <typename Acc>
__global__ void __launch_bounds__(kThreads) finish_loss_kernel(const LossSums sums) {
  double total[2] = {};
  const Acc* pairs = static_cast<const Acc*>(sums.pairs);
  for (int64_t i = threadIdx.x; i < sums.count; i += kThreads) {
    total[0] += pairs[2 * i];
    total[1] += pairs[2 * i + 1];
  }
  block_sums<kThreads>(total);
  if (threadIdx.x == 0) {
    const double denominator =
        at_least_one(sums.divide_by_second ? total[1] : load<double>(sums.denominator));
    if (sums.loss != nullptr) {
      *static_cast<Acc*>(sums.loss) = static_cast<Acc>(sums.scale * total[0] / denominator);
    }
    if (sums.used_denominator != nullptr) {
      *static_cast<Acc*>(sums.used_denominator) = static_cast<Acc>(denominator);
    }
  }
}

} // namespace

void finish_loss(const LossSums& sums, bool is_double, cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    HKD_LAUNCH(finish_loss_kernel<decltype(acc)>, 1, kThreads, 0, stream, sums);
  });
}

} // namespace hkd
