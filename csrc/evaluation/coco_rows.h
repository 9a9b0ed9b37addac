// COCO rows as json.load makes them, read into arrays.
#pragma once

#include <pybind11/pybind11.h>

namespace hkd {

// A tuple of arrays, in the order of the rows, of those that are of `category`; None where a row is
// not as json.load makes a good one, which hkd_d2/evaluation/miss_rate.py then takes or refuses by
// name. `image_index` has the index of each image id.
//
// Annotations: image int64 (N,), box float64 (N, 4), height, visibility float64 (N,), ignore bool
// (N,).
pybind11::object read_annotations(
    const pybind11::list& rows, const pybind11::dict& image_index, long category);

// Detections: image int64 (N,), box float64 (N, 4), score float64 (N,).
pybind11::object read_detections(
    const pybind11::list& rows, const pybind11::dict& image_index, long category);

} // namespace hkd
