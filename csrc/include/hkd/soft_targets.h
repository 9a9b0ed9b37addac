// KL divergence and cross-entropy between a teacher's and a student's temperature-scaled classes,
// and their gradients.
//
// Both are, over the classes k of a row with weights c_k, the sum of c_k q_k (d ln q_k - ln p_k):
// the KL divergence with d = 1, the cross-entropy with d = 0. V is a float, a vector of floats or
// (double logits) a double; classes are added up in double. Needs no torch header, so that host and
// device share it. A NaN passes through.
#pragma once

#include "hkd/macros.h"
#include "hkd/vector_math.h"

namespace hkd {

// weight (d ln q - ln p); a class of no weight, which one that the teacher excludes has, adds 0 and
// not 0 times infinity.
template <typename V>
HKD_HD V soft_target_term(V weight, V log_q, V log_p, bool kl) {
  const V term = weight * (kl ? log_q - log_p : -log_p);
  return weight == 0 ? V{} : term;
}

// What one class of a softmax adds to the sums of its row. s and t are the scaled logits less their
// maxima, of the student and of the teacher.
template <typename V>
struct SoftmaxTerm {
  V s_exp, t_exp, weight, term;

  HKD_HD SoftmaxTerm(V s, V t, V class_weight, bool kl)
      : s_exp(vector_exp<V>(s)),
        t_exp(vector_exp<V>(t)),
        weight(class_weight * t_exp),
        term(soft_target_term<V>(weight, t, s, kl)) {
  }
};

// The loss of a row from the sums of its terms: with q_k = t_exp_k / sum t_exp and
// ln p_k = s_k - ln sum s_exp.
template <typename Acc>
HKD_HD double softmax_row_loss(double s_exp, double t_exp, double weight, double term, bool kl) {
  const double log = log_of_sum(kl ? s_exp / t_exp : s_exp, Acc());
  return (term + weight * log) / t_exp;
}

// One class of independent Bernoulli variables.
template <typename V>
HKD_HD V sigmoid_term(V s, V t, V class_weight, bool kl) {
  const Bernoulli<V> student(s), teacher(t);
  return soft_target_term<V>(class_weight * teacher.p, teacher.log_p, student.log_p, kl) +
         soft_target_term<V>(
             class_weight * teacher.not_p, teacher.log_not_p, student.log_not_p, kl);
}

// p - q, without cancellation where both are close to 1.
template <typename V>
HKD_HD V sigmoid_difference(V s, V t) {
  const Bernoulli<V> student(s), teacher(t);
  return teacher.not_p * student.p - teacher.p * student.not_p;
}

} // namespace hkd
