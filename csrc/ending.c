/* What a script leaves to be done at its end: threads that run, callbacks registered, files that hold back what was
 * written, objects that do something as they go. Most leave nothing, and then the guest's Python, each function of which
 * copies pages when called, is not asked.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "jail.h"

static const char *const file_names[] = {"TextIOWrapper", "BufferedWriter", "BufferedRandom"};
enum { FILE_TYPES = sizeof file_names / sizeof *file_names };
static PyObject *thread_count, *callback_count, *young_objects, *file_types[FILE_TYPES];
static long callbacks;

static PyObject *member(const char *module, const char *name) {
    PyObject *from = PyImport_ImportModule(module);
    PyObject *found = from ? PyObject_GetAttrString(from, name) : NULL;
    Py_XDECREF(from);
    return found;
}

static long count_of(PyObject *function) {
    PyObject *number = PyObject_CallNoArgs(function);
    long value = number ? PyLong_AsLong(number) : -1;
    Py_XDECREF(number);
    return value;
}

bool ending_begin(void) {
    for (int i = 0; i < FILE_TYPES; i++)
        if ((file_types[i] = member("_io", file_names[i])) == NULL) return false;
    if ((thread_count = member("_thread", "_count")) == NULL) return false;
    if ((callback_count = member("atexit", "_ncallbacks")) == NULL) return false;
    if ((young_objects = member("gc", "get_objects")) == NULL) return false;
    PyObject *objects = PyObject_CallNoArgs(young_objects); /* its first call makes what later ones need */
    Py_XDECREF(objects);
    return objects != NULL && (callbacks = count_of(callback_count)) >= 0;
}

static bool is_left(PyObject *item) {
    PyTypeObject *type = Py_TYPE(item);
    if (PyGen_CheckExact(item) || (PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE) && type->tp_finalize != NULL)) return true;
    for (int i = 0; i < FILE_TYPES; i++)
        if (type == (PyTypeObject *)file_types[i]) return true;
    return false;
}

static bool any_left(PyObject *objects) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects); i++)
        if (is_left(PyList_GET_ITEM(objects, i))) return true;
    return false;
}

bool ending_due(void) {
    if (count_of(thread_count) != 0 || count_of(callback_count) != callbacks) return PyErr_Clear(), true;
    if (PySys_GetObject("stdout") != PySys_GetObject("__stdout__")) return true;
    PyObject *objects = PyObject_CallNoArgs(young_objects);
    bool due = objects == NULL || any_left(objects);
    PyErr_Clear();
    Py_XDECREF(objects);
    return due;
}
