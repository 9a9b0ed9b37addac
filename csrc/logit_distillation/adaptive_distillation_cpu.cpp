// Adaptive distillation loss on the CPU, forward and backward, over a list of tensors.
//
// The forward adds up the losses and the normaliser's q^theta in one pass over memory, the backward
// computes everything again rather than have the forward store it: reading logits and probabilities
// twice costs less than writing and reading a gradient that has yet to be scaled.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "hkd/adaptive_distillation.h"
#include "tensor_list.h"

namespace hkd {
namespace {

constexpr int64_t kBlock = 16384;
constexpr int64_t kChunk = 1024; // stays in the first-level cache

// The arguments element by element.
struct Elements : DenseLists {
  using DenseLists::DenseLists;

  std::vector<int64_t> counts() const {
    std::vector<int64_t> counts;
    for (const Tensor& x : logits) {
      counts.push_back(x.numel());
    }
    return counts;
  }

  // Calls body(index of the block, tensor, begin, count, x, q, free scratch, lanes) for every chunk
  // of every block.
  template <typename Acc, typename Body>
  void for_each_chunk(const std::vector<Block>& blocks, const Body& body) const {
    const std::vector<Values> x = to_read("student_logits", logits),
                              q = to_read("teacher_probs", probs);
    for_each_block<Acc>(
        blocks, 3 * kChunk, [&](int64_t index, const Block& block, Acc* scratch, auto lanes) {
          for (int64_t begin = block.begin; begin < block.end; begin += kChunk) {
            const int64_t count = std::min(kChunk, block.end - begin);
            body(
                index,
                block.tensor,
                begin,
                count,
                x[block.tensor].read(begin, count, scratch),
                q[block.tensor].read(begin, count, scratch + kChunk),
                scratch + 2 * kChunk,
                lanes);
          }
        });
  }
};

// Calls body with kSquare and kEntropy as constants.
template <typename Acc, typename Body>
void specialise(const AdaptiveDistillation<Acc>& loss, const Body& body) {
  const auto with = [&](auto square) {
    loss.needs_entropy() ? body(square, std::true_type{}) : body(square, std::false_type{});
  };
  loss.gamma == 2 ? with(std::true_type{}) : with(std::false_type{});
}

template <typename Acc>
void clear(Acc* values, const bool* ignored, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = ignored[i] ? Acc(0) : values[i];
  }
}

std::tuple<Tensor, Tensor> adaptive_distillation_loss_cpu(
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_probs,
    std::vector<Tensor> ignore,
    double gamma,
    double alpha,
    double beta_c,
    std::optional<double> theta,
    bool kl) {
  const Elements elements(student_logits, teacher_probs, ignore);
  const std::vector<Block> blocks = cut_into_blocks(elements.counts(), kBlock);
  std::vector<double> losses(blocks.size()), masses(blocks.size());

  dispatch_accumulate(student_logits[0].scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const AdaptiveDistillation<Acc> loss(gamma, alpha, beta_c, kl);
    const Exponent<Acc> power(theta.value_or(0));
    specialise(loss, [&](auto square, auto entropy) {
      elements.for_each_chunk<Acc>(
          blocks,
          [&](int64_t block,
              size_t tensor,
              int64_t begin,
              int64_t count,
              const Acc* x,
              const Acc* q,
              Acc* values,
              auto lanes) {
            using V = Vector<Acc, lanes.value>;
            map<V>(x, q, values, count, [&](const V& x, const V& q) {
              return adaptive_loss<square.value, entropy.value>(loss, x, q);
            });
            if (const bool* ignored = elements.mask(tensor)) {
              clear(values, ignored + begin, count);
            }
            losses[block] += sum_of(values, count);
            if (theta) {
              map<V>(
                  q, q, values, count, [&](const V& q, const V&) { return vector_pow(q, power); });
              masses[block] += sum_of(values, count);
            }
          });
    });
  });
  const double normalizer = theta ? at_least_one(sum_of(masses)) : 1;
  return {
      scalar_like(student_logits[0], sum_of(losses) / normalizer),
      scalar_like(student_logits[0], normalizer)};
}

std::vector<Tensor> adaptive_distillation_loss_backward_cpu(
    const Tensor& grad,
    const Tensor& normalizer,
    std::vector<Tensor> student_logits,
    std::vector<Tensor> teacher_probs,
    std::vector<Tensor> ignore,
    double gamma,
    double alpha,
    double beta_c,
    bool kl) {
  const Elements elements(student_logits, teacher_probs, ignore);
  const std::vector<Block> blocks = cut_into_blocks(elements.counts(), kBlock);
  const double scale = number_of("grad", grad) / number_of("normalizer", normalizer);
  DenseGradients gradients(student_logits, elements);
  const std::vector<Values> targets = to_write(gradients.written);

  dispatch_accumulate(student_logits[0].scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const AdaptiveDistillation<Acc> loss(gamma, alpha, beta_c, kl);
    const Acc factor = static_cast<Acc>(scale);
    specialise(loss, [&](auto square, auto entropy) {
      elements.for_each_chunk<Acc>(
          blocks,
          [&](int64_t,
              size_t tensor,
              int64_t begin,
              int64_t count,
              const Acc* x,
              const Acc* q,
              Acc* values,
              auto lanes) {
            using V = Vector<Acc, lanes.value>;
            map<V>(x, q, values, count, [&](const V& x, const V& q) {
              return factor * adaptive_gradient<square.value, entropy.value>(loss, x, q);
            });
            if (const bool* ignored = elements.mask(tensor)) {
              clear(values, ignored + begin, count);
            }
            targets[tensor].write(values, begin, count);
          });
    });
  });
  return gradients.finish();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hkd_d2, CPU, m) {
  m.impl("adaptive_distillation_loss", TORCH_BOX(&adaptive_distillation_loss_cpu));
  m.impl(
      "adaptive_distillation_loss_backward", TORCH_BOX(&adaptive_distillation_loss_backward_cpu));
}

} // namespace hkd
