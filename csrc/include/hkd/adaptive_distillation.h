// One element of the adaptive distillation loss and its gradient.
//
// V is a float, a vector of floats or a double, Acc the type of its lanes. Needs no torch header,
// so that host and device share it.
#pragma once

#include "hkd/macros.h"
#include "hkd/vector_math.h"

namespace hkd {

// l = A^gamma W with, for a student of probability p and a teacher of probability q,
//   A = 1 - exp(-max(D, 0)),  D = -q ln p - (1 - q) ln(1 - p) - beta_c H(q),
//   W = -positive q ln p - negative (1 - q) ln(1 - p) - entropy H(q).
template <typename Acc>
struct AdaptiveDistillation {
  Acc positive, negative, entropy, beta_c, gamma;
  Exponent<Acc> focus; // gamma
  Exponent<Acc> slope; // gamma - 1

  // The outer factor W is KL(q || p), or the cross-entropy with the classes weighted alpha and
  // 1 - alpha.
  HKD_HD AdaptiveDistillation(double gamma, double alpha, double beta_c, bool kl)
      : positive(static_cast<Acc>(kl ? 1 : alpha)),
        negative(static_cast<Acc>(kl ? 1 : 1 - alpha)),
        entropy(static_cast<Acc>(kl ? 1 : 0)),
        beta_c(static_cast<Acc>(beta_c)),
        gamma(static_cast<Acc>(gamma)),
        focus(gamma),
        slope(gamma - 1) {
  }

  HKD_HD bool needs_entropy() const {
    return entropy != 0 || beta_c != 0;
  }
};

// D, A and W of one element. kEntropy: H(q) is needed.
template <bool kEntropy, typename V>
struct AdaptiveElement {
  Bernoulli<V> student;
  V q, not_q, focus, outer;

  template <typename Acc>
  HKD_HD AdaptiveElement(const AdaptiveDistillation<Acc>& loss, V logit, V probability)
      : student(logit), q(probability), not_q(1 - probability) {
    const V positive = -q * student.log_p;
    const V negative = -not_q * student.log_not_p;
    V excess = positive + negative;
    outer = loss.positive * positive + loss.negative * negative;
    if (kEntropy) {
      const V entropy = -x_log_x<V>(q) - x_log_x<V>(not_q);
      excess = excess - loss.beta_c * entropy;
      outer = outer - loss.entropy * entropy;
    }
    focus = -vector_expm1<V>(excess < 0 ? V{} : -excess);
  }
};

// kSquare: gamma is 2. Where A is 0 or NaN its power is 0, whatever the exponent.
template <bool kSquare, bool kEntropy, typename V, typename Acc>
HKD_HD V adaptive_loss(const AdaptiveDistillation<Acc>& loss, V logit, V probability) {
  const AdaptiveElement<kEntropy, V> e(loss, logit, probability);
  const V power = kSquare ? e.focus * e.focus : vector_pow(e.focus, loss.focus);
  return (e.focus > 0 ? power : V{}) * e.outer;
}

template <bool kSquare, bool kEntropy, typename V, typename Acc>
HKD_HD V adaptive_gradient(const AdaptiveDistillation<Acc>& loss, V logit, V probability) {
  const AdaptiveElement<kEntropy, V> e(loss, logit, probability);
  const V above = e.not_q * e.student.p, below = e.q * e.student.not_p;
  const V outer = loss.negative * above - loss.positive * below;
  const V power = kSquare ? e.focus : vector_pow(e.focus, loss.slope); // A^(gamma - 1)
  const V slope = loss.gamma * power * (1 - e.focus) * e.outer * (above - below);
  const V gradient = power * e.focus * outer + (loss.gamma == 0 ? V{} : slope);
  return e.focus > 0 ? gradient : 0 * outer;
}

} // namespace hkd
