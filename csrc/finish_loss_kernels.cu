// The last step of a loss: the blocks' sums, added up by one block in double.
#include "finish_loss.cuh"
#include "hkd/reduce.cuh"

namespace hkd {
namespace {

constexpr int kThreads = 256;

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
    finish<Acc>(sums, total[0], total[1]);
  }
}

} // namespace

void finish_loss(const LossSums& sums, bool is_double, cudaStream_t stream) {
  dispatch_loss_type(is_double, [&](auto acc) {
    HKD_LAUNCH(finish_loss_kernel<decltype(acc)>, 1, kThreads, 0, stream, sums);
  });
}

} // namespace hkd
