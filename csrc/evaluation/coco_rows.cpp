#include "evaluation/coco_rows.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace hkd {
namespace {

// One row, an exact dict. What a member returns is false or null where the row is out of the
// ordinary; no Python error is left behind.
class Row {
 public:
  explicit Row(PyObject* row) : row_(row) {
  }

  // Borrowed; null without such a key.
  PyObject* get(const py::str& key) const {
    PyObject* value = PyDict_GetItemWithError(row_, key.ptr());
    if (!value) {
      PyErr_Clear();
    }
    return value;
  }

  bool integer(const py::str& key, int64_t& number) const {
    PyObject* value = get(key);
    if (!value || !PyLong_CheckExact(value)) {
      return false;
    }
    number = PyLong_AsLongLong(value);
    return !failed(number == -1);
  }

  bool number(const py::str& key, double& number) const {
    return finite(get(key), number);
  }

  bool image(const py::str& key, const py::dict& image_index, int64_t& index) const {
    PyObject* id = get(key);
    if (!id || !PyLong_CheckExact(id)) {
      return false;
    }
    PyObject* value = PyDict_GetItemWithError(image_index.ptr(), id);
    if (!value) {
      PyErr_Clear();
      return false;
    }
    index = PyLong_AsLongLong(value);
    return !failed(index == -1);
  }

  bool box(const py::str& key, std::vector<double>& boxes) const {
    PyObject* values = get(key);
    if (!values || !PyList_CheckExact(values) || PyList_GET_SIZE(values) != 4) {
      return false;
    }
    double box[4];
    for (int i = 0; i < 4; ++i) {
      if (!finite(PyList_GET_ITEM(values, i), box[i])) {
        return false;
      }
    }
    boxes.insert(boxes.end(), box, box + 4);
    return box[2] >= 0 && box[3] >= 0;
  }

 private:
  static bool failed(bool suspicious) {
    if (suspicious && PyErr_Occurred()) {
      PyErr_Clear();
      return true;
    }
    return false;
  }

  static bool finite(PyObject* value, double& number) {
    if (!value) {
      return false;
    }
    if (PyFloat_CheckExact(value)) {
      number = PyFloat_AS_DOUBLE(value);
    } else if (PyLong_CheckExact(value)) {
      number = PyLong_AsDouble(value);
      if (failed(number == -1)) {
        return false;
      }
    } else {
      return false;
    }
    return std::isfinite(number);
  }

  PyObject* row_;
};

// Calls read(row) for each row as long as it returns true.
template <typename Read>
bool all_rows(const py::list& rows, const Read& read) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(rows.ptr()); ++i) {
    PyObject* row = PyList_GET_ITEM(rows.ptr(), i);
    if (!PyDict_CheckExact(row) || !read(Row(row))) {
      return false;
    }
  }
  return true;
}

// An array over the vector's memory.
template <typename T>
py::array_t<T> to_array(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  py::capsule owner(owned, [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  return py::array_t<T>(std::move(shape), owned->data(), owner);
}

bool has_twice(std::vector<int64_t>& ids) {
  std::sort(ids.begin(), ids.end());
  return std::adjacent_find(ids.begin(), ids.end()) != ids.end();
}

} // namespace

py::object read_annotations(const py::list& rows, const py::dict& image_index, long category) {
  const py::str id_key("id"), image_key("image_id"), category_key("category_id");
  const py::str box_key("bbox"), height_key("height"), vis_key("vis_ratio"), ignore_key("ignore");
  std::vector<int64_t> ids, images;
  std::vector<double> boxes, heights, visibilities;
  std::vector<uint8_t> ignored;
  const bool ordinary = all_rows(rows, [&](const Row& row) {
    int64_t id, image, of_category, ignore = 0;
    if (!row.image(image_key, image_index, image) || !row.integer(category_key, of_category) ||
        !row.integer(id_key, id)) {
      return false;
    }
    ids.push_back(id);
    if (of_category != category) {
      return true;
    }
    double height, visibility;
    if (!row.box(box_key, boxes) || !row.number(height_key, height) ||
        !row.number(vis_key, visibility) || height < 0 || visibility < 0) {
      return false;
    }
    if (row.get(ignore_key) && !(row.integer(ignore_key, ignore) && (ignore == 0 || ignore == 1))) {
      return false;
    }
    images.push_back(image);
    heights.push_back(height);
    visibilities.push_back(visibility);
    ignored.push_back(static_cast<uint8_t>(ignore));
    return true;
  });
  if (!ordinary || has_twice(ids)) {
    return py::none();
  }
  const auto count = static_cast<py::ssize_t>(images.size());
  return py::make_tuple(
      to_array(std::move(images), {count}),
      to_array(std::move(boxes), {count, 4}),
      to_array(std::move(heights), {count}),
      to_array(std::move(visibilities), {count}),
      to_array(std::move(ignored), {count}).attr("view")(py::dtype::of<bool>()));
}

py::object read_detections(const py::list& rows, const py::dict& image_index, long category) {
  const py::str image_key("image_id"), category_key("category_id");
  const py::str box_key("bbox"), score_key("score");
  std::vector<int64_t> images;
  std::vector<double> boxes, scores;
  images.reserve(rows.size());
  boxes.reserve(4 * rows.size());
  scores.reserve(rows.size());
  const bool ordinary = all_rows(rows, [&](const Row& row) {
    int64_t image, of_category;
    double score;
    // Those of another category are checked too.
    if (!row.image(image_key, image_index, image) || !row.integer(category_key, of_category) ||
        !row.box(box_key, boxes) || !row.number(score_key, score)) {
      return false;
    }
    if (of_category == category) {
      images.push_back(image);
      scores.push_back(score);
    } else {
      boxes.resize(boxes.size() - 4);
    }
    return true;
  });
  if (!ordinary) {
    return py::none();
  }
  const auto count = static_cast<py::ssize_t>(images.size());
  return py::make_tuple(
      to_array(std::move(images), {count}),
      to_array(std::move(boxes), {count, 4}),
      to_array(std::move(scores), {count}));
}

} // namespace hkd
