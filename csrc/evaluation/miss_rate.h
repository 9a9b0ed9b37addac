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
  const int64_t* image; // not falling
  const double* box;    // (count, 4)
  const double* height;
  const double* visibility;
  const bool* ignore; // the file's own flag
};

struct Detections {
  int64_t count;
  const int64_t* image;
  const double* box; // (count, 4)
  const double* score;
};

// Ranges of what counts: of ground truth with both bounds, of detections without the upper one.
struct Setup {
  double height[2];
  double visibility[2];
  double detection_height[2];
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
    const std::vector<Setup>& setups,
    const Protocol& protocol);

// The operating points of one setup. `score`, `fppi` and `miss` have room for
// verdicts.points[setup]; `miss` is NaN where nothing is countable.
void trace_curve(
    const Verdicts& verdicts, int setup, int64_t images, double* score, double* fppi, double* miss);

} // namespace hkd
