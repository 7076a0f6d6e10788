// What Python needs of the library: importing it loads it, and loading it registers the operators.
#include <Python.h>

#include "target.h"

namespace {

PyObject* target_name(PyObject*, PyObject*) {
  switch (voxtrast::target()) {
    case voxtrast::Target::avx512:
      return PyUnicode_FromString("avx512");
    case voxtrast::Target::avx2:
      return PyUnicode_FromString("avx2");
    default:
      return PyUnicode_FromString("portable");
  }
}

PyMethodDef methods[] = {{"target", target_name, METH_NOARGS, "The instruction set that the operators take."},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&definition);
}
