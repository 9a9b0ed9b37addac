#include "evaluation/bindings.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <stdexcept>

#include "evaluation/coco_rows.h"
#include "evaluation/miss_rate.h"

namespace py = pybind11;

namespace hkd {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void require(bool condition, const char* message) {
  if (!condition) {
    throw std::invalid_argument(message);
  }
}

template <typename T>
const T* checked(const Array<T>& array, py::ssize_t rows, py::ssize_t columns = 1) {
  require(array.size() == rows * columns, "the arrays differ in length");
  return array.data();
}

const int64_t* checked_images(const Array<int64_t>& image, int64_t images) {
  const int64_t* data = image.data();
  const bool inside = std::all_of(
      data, data + image.size(), [&](int64_t index) { return index >= 0 && index < images; });
  require(inside, "an image index is out of range");
  return data;
}

py::list trace_setups(
    const Array<int64_t>& truth_image,
    const Array<double>& truth_box,
    const Array<double>& truth_counted_box,
    const Array<bool>& truth_region,
    const Array<SetupMask>& truth_countable,
    const Array<int64_t>& image,
    const Array<double>& box,
    const Array<double>& score,
    const Array<double>& heights,
    int64_t images,
    int64_t max_detections,
    double min_overlap) {
  const py::ssize_t boxes = truth_image.size();
  const GroundTruth truth = {
      boxes,
      checked_images(truth_image, images),
      checked(truth_box, boxes, 4),
      checked(truth_counted_box, boxes, 4),
      checked(truth_region, boxes),
      checked(truth_countable, boxes),
  };
  require(std::is_sorted(truth.image, truth.image + boxes), "the ground truth is not by image");
  const py::ssize_t count = image.size();
  const Detections detections = {
      count, checked_images(image, images), checked(box, count, 4), checked(score, count)};
  std::vector<Heights> setups(heights.size() / 2);
  require(setups.size() <= kMaxSetups, "more than 64 setups");
  const double* bounds = checked(heights, static_cast<py::ssize_t>(setups.size()), 2);
  for (Heights& setup : setups) {
    setup = {bounds[0], bounds[1]};
    bounds += 2;
  }

  Verdicts verdicts;
  {
    py::gil_scoped_release release;
    verdicts = match(truth, detections, setups, {images, max_detections, min_overlap});
  }
  py::list curves;
  for (size_t s = 0; s < setups.size(); ++s) {
    const auto points = static_cast<py::ssize_t>(verdicts.points[s]);
    Array<double> scores(points), fppi(points), miss(points);
    trace_curve(
        verdicts,
        static_cast<int>(s),
        images,
        scores.mutable_data(),
        fppi.mutable_data(),
        miss.mutable_data());
    curves.append(py::make_tuple(verdicts.countable[s], scores, fppi, miss));
  }
  return curves;
}

} // namespace

void bind_evaluation(py::module_& module) {
  module.def(
      "read_annotations",
      &read_annotations,
      py::arg("rows"),
      py::arg("image_index"),
      py::arg("category"));
  module.def(
      "read_detections",
      &read_detections,
      py::arg("rows"),
      py::arg("image_index"),
      py::arg("category"));
  module.def(
      "trace_setups",
      &trace_setups,
      "For each setup the countable boxes, and score, FPPI and miss of every operating point.\n\n"
      "truth_countable is uint64 (G,): bit s says that setup s counts the box. heights is float64\n"
      "(setups, 2): of detections, the upper bound left out. See hkd_d2.evaluation.miss_rate.",
      py::arg("truth_image"),
      py::arg("truth_box"),
      py::arg("truth_counted_box"),
      py::arg("truth_region"),
      py::arg("truth_countable"),
      py::arg("image"),
      py::arg("box"),
      py::arg("score"),
      py::kw_only(),
      py::arg("heights"),
      py::arg("images"),
      py::arg("max_detections"),
      py::arg("min_overlap"));
}

} // namespace hkd
