// Matching of detections with ground truth for the log-average miss rate, of up to 64 setups in one
// pass. The definition, whose results this repeats to the last bit, is
// hkd_d2/evaluation/miss_rate.py. Needs neither Python nor PyTorch.
#pragma once

#include <cstdint>
#include <vector>

namespace hkd {

constexpr int kMaxSetups = 64; // bits of a SetupMask

// Bit s stands for setup s.
using SetupMask = uint64_t;

// Boxes are x, y, width, height in pixels; images are indices in the order of their ids.
struct GroundTruth {
  int64_t count;
  const int64_t* image;       // not falling
  const double* box;          // (count, 4), as it is where ignored
  const double* counted_box;  // (count, 4), as it is where countable; may be `box`
  const bool* region;         // ignored, it absorbs by the detection's own area, not by the union
  const SetupMask* countable; // the setups that count it; the others ignore it
};

struct Detections {
  int64_t count;
  const int64_t* image;
  const double* box; // (count, 4)
  const double* score;
};

// Heights of the detections that one setup keeps, the upper bound left out.
struct Heights {
  double first;
  double end;
};

struct Protocol {
  int64_t images;
  int64_t max_detections; // of an image
  double min_overlap;
};

// A detection that counts in some setup: as true or false positive, neither dropped nor absorbed.
struct Verdict {
  double score;
  SetupMask counted;
  SetupMask matched; // the true positives
};

struct Verdicts {
  std::vector<Verdict> ranked;    // of all images, by falling score
  std::vector<int64_t> countable; // ground-truth boxes of each setup
  std::vector<int64_t> points;    // detections that count, of each setup
};

Verdicts match(
    const GroundTruth& truth,
    const Detections& detections,
    const std::vector<Heights>& setups,
    const Protocol& protocol);

// The operating points of one setup. `score`, `fppi` and `miss` have room for
// verdicts.points[setup]; `miss` is NaN where nothing is countable.
void trace_curve(
    const Verdicts& verdicts, int setup, int64_t images, double* score, double* fppi, double* miss);

} // namespace hkd
