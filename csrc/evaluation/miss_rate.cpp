#include "evaluation/miss_rate.h"

#include <algorithm>
#include <limits>

namespace hkd {
namespace {

// Detections by image, in the order of the file within an image: those of image i are
// items[start[i]] to items[start[i + 1] - 1].
struct ByImage {
  std::vector<int64_t> start;
  std::vector<int64_t> items;

  ByImage(const Detections& detections, int64_t images)
      : start(images + 2), items(detections.count) {
    for (int64_t i = 0; i < detections.count; ++i) {
      ++start[detections.image[i] + 2];
    }
    for (int64_t i = 2; i < images + 2; ++i) {
      start[i] += start[i - 1];
    }
    for (int64_t i = 0; i < detections.count; ++i) {
      items[start[detections.image[i] + 1]++] = i;
    }
  }
};

// A countable box that overlaps a detection enough.
struct Candidate {
  double overlap;
  int64_t truth;
};

// The largest overlap first, of equals the box that is later in the file.
bool is_tried_before(const Candidate& a, const Candidate& b) {
  return a.overlap != b.overlap ? a.overlap > b.overlap : a.truth > b.truth;
}

// 0 where the boxes do not overlap.
double intersection(const double* a, const double* b) {
  const double across = std::min(a[0] + a[2], b[0] + b[2]) - std::max(a[0], b[0]);
  const double down = std::min(a[1] + a[3], b[1] + b[3]) - std::max(a[1], b[1]);
  const double common = across * down;
  return across > 0 && down > 0 && common > 0 ? common : 0;
}

} // namespace

Verdicts match(
    const GroundTruth& truth,
    const Detections& detections,
    const std::vector<Heights>& setups,
    const Protocol& protocol) {
  Verdicts verdicts;
  verdicts.countable.resize(setups.size());
  verdicts.points.resize(setups.size());
  for (int64_t g = 0; g < truth.count; ++g) {
    for (size_t s = 0; s < setups.size(); ++s) {
      verdicts.countable[s] += truth.countable[g] >> s & 1;
    }
  }
  const bool resized = truth.counted_box != truth.box;

  ByImage by_image(detections, protocol.images);
  std::vector<SetupMask> taken(truth.count);
  std::vector<Candidate> candidates;
  int64_t last_truth = 0;
  for (int64_t image = 0; image < protocol.images; ++image) {
    const int64_t first_truth = last_truth;
    while (last_truth < truth.count && truth.image[last_truth] == image) {
      ++last_truth;
    }
    int64_t* first = by_image.items.data() + by_image.start[image];
    int64_t* last = by_image.items.data() + by_image.start[image + 1];
    std::stable_sort(first, last, [&](int64_t a, int64_t b) {
      return detections.score[a] > detections.score[b];
    });
    last = first + std::min<int64_t>(last - first, protocol.max_detections);
    for (const int64_t* detection = first; detection < last; ++detection) {
      const double* d = detections.box + 4 * *detection;
      SetupMask kept = 0;
      for (size_t s = 0; s < setups.size(); ++s) {
        const bool inside = d[3] >= setups[s].first && d[3] < setups[s].end;
        kept |= static_cast<SetupMask>(inside) << s;
      }

      SetupMask absorbed = 0;
      candidates.clear();
      const double area = d[2] * d[3];
      for (int64_t g = first_truth; g < last_truth; ++g) {
        const double* t = truth.box + 4 * g;
        const double* c = truth.counted_box + 4 * g;
        const double common = intersection(d, t);
        const double counted_common = resized ? intersection(d, c) : common;
        if (common > 0) {
          const double of = truth.region[g] ? area : area + t[2] * t[3] - common;
          if (common / of >= protocol.min_overlap) {
            absorbed |= ~truth.countable[g];
          }
        }
        if (counted_common > 0 && truth.countable[g]) {
          const double overlap = counted_common / (area + c[2] * c[3] - counted_common);
          if (overlap >= protocol.min_overlap) {
            candidates.push_back({overlap, g});
          }
        }
      }
      std::sort(candidates.begin(), candidates.end(), is_tried_before);

      SetupMask matched = 0;
      for (const Candidate& candidate : candidates) {
        const SetupMask found =
            kept & ~matched & truth.countable[candidate.truth] & ~taken[candidate.truth];
        taken[candidate.truth] |= found;
        matched |= found;
      }
      const SetupMask counted = kept & (matched | ~absorbed);
      if (!counted) {
        continue;
      }
      verdicts.ranked.push_back({detections.score[*detection], counted, matched});
      for (size_t s = 0; s < setups.size(); ++s) {
        verdicts.points[s] += counted >> s & 1;
      }
    }
  }
  // Equals stay in the order of images, then of their image.
  std::stable_sort(
      verdicts.ranked.begin(), verdicts.ranked.end(), [](const Verdict& a, const Verdict& b) {
        return a.score > b.score;
      });
  return verdicts;
}

void trace_curve(
    const Verdicts& verdicts,
    int setup,
    int64_t images,
    double* score,
    double* fppi,
    double* miss) {
  const int64_t countable = verdicts.countable[setup];
  int64_t points = 0;
  int64_t found = 0;
  for (const Verdict& verdict : verdicts.ranked) {
    if (!(verdict.counted >> setup & 1)) {
      continue;
    }
    found += verdict.matched >> setup & 1;
    score[points] = verdict.score;
    fppi[points] = static_cast<double>(points + 1 - found) / static_cast<double>(images);
    miss[points] = countable ? 1 - static_cast<double>(found) / static_cast<double>(countable)
                             : std::numeric_limits<double>::quiet_NaN();
    ++points;
  }
}

} // namespace hkd
