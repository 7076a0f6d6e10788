// The dataclasses of methods/views.py as the structs of view_spec.h.
#pragma once

#include <pybind11/pybind11.h>

#include "view_spec.h"

namespace voxtrast {

// Ranges are taken as they are: whoever calls has checked them. Throws std::invalid_argument for unknown names.
ViewSpec declared_spec(const pybind11::object& spec);

}  // namespace voxtrast
