/* fastgrpo_sandbox._jail: serve() forks jobs and returns only in a child; receive() waits there for the job. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "jail.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

static uint32_t address_space_mb(int proc) {
    char text[64] = "";
    int fd = openat(proc, "self/statm", 0);
    if (fd >= 0 && read(fd, text, sizeof text - 1) < 0) text[0] = 0;
    if (fd >= 0) close(fd);
    return (uint32_t)(strtoul(text, NULL, 10) >> 8) + 1;
}

/* What a child needs for a plain script, known before it is forked: each object fetched in a child copies pages. */
static struct {
    PyObject *file, *module, *end;
    Py_buffer result;
} script;

static PyObject *serve(PyObject *self, PyObject *args) {
    int host, proc, groups, is_for_sessions;
    unsigned int armed;
    PyObject *child;
    if (!PyArg_ParseTuple(args, "iiiIpUO!y*OO", &host, &proc, &groups, &armed, &is_for_sessions, &script.file, &PyModule_Type,
                          &script.module, &script.result, &script.end, &child)) return NULL;
    PyObject *receive = PyObject_GetAttrString(self, "receive");
    if (receive == NULL) return NULL;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (!ending_begin()) return NULL;
    image_seal();
    image_pack(proc);
    uint32_t base_mb = address_space_mb(proc); /* before the arena, which children do not inherit */
    arena_open();
    if (!jail_without("seccomp") && seccomp_begin() != 0) return PyErr_SetFromErrno(PyExc_OSError);
    server *s = arena_alloc(sizeof *s);
    s->host = host;
    s->proc = proc;
    s->groups = groups;
    s->uid = getuid();
    s->gid = getgid();
    s->armed_target = armed < MAX_ARMED ? armed : MAX_ARMED;
    s->most_calls = is_for_sessions ? MOST_CALLS : 0;
    s->base_mb = base_mb;
    server_run(s);
    /* One thread before and after, no lock held, the same thread block: CPython needs no repair after this fork, and each
     * page it would touch is a page to copy. */
    Py_LeaveRecursiveCall(); /* this call's own, which is not to count against a job's recursion */
    return PyObject_CallOneArg(child, receive);
}

/* ---- a plain script, in C from the job to its result: each Python function called on the way would copy pages ---- */

enum { PLAIN = 'S', SECRET = 'U' }; /* first byte of a payload: nothing but source text; a secret, then the rest */
static char *plain_source;

/* The secret of a same-process verdict, and the frame that may use it: neither is a Python object that a job could find. */
static char secret[32];
static void *owner;

static size_t take_secret(char *payload, size_t length) {
    if (payload[0] != SECRET || length <= sizeof secret) return 0;
    memcpy(secret, payload + 1, sizeof secret);
    explicit_bzero(payload, 1 + sizeof secret);
    return 1 + sizeof secret;
}

static bool is_closed(PyObject *stream) {
    PyObject *closed = PyObject_GetAttrString(stream, "closed");
    bool is_true = closed != NULL && PyObject_IsTrue(closed) == 1;
    Py_XDECREF(closed);
    PyErr_Clear();
    return is_true;
}

/* As the interpreter does at its end, which leaves alone a stream that the script closed. */
static int flush(const char *name) {
    PyObject *stream = PySys_GetObject(name);
    if (stream == NULL || stream == Py_None) return 0;
    Py_INCREF(stream);  /* what the script put there may replace it when asked */
    if (is_closed(stream)) {
        Py_DECREF(stream);
        return 0;
    }
    PyObject *done = PyObject_CallMethod(stream, "flush", NULL);
    Py_DECREF(stream);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Executes `source` in `module` and flushes what it printed; -1 with an exception set. */
static int run_source(const char *source, PyObject *file, PyObject *module) {
    PyCompilerFlags flags = {.cf_flags = PyCF_SOURCE_IS_UTF8 | PyCF_IGNORE_COOKIE, .cf_feature_version = PY_MINOR_VERSION};
    PyObject *code = Py_CompileStringObject(source, file, Py_file_input, &flags, -1);
    if (code == NULL) return -1;
    PyObject *names = PyModule_GetDict(module);
    PyObject *done = PyEval_EvalCode(code, names, names);
    Py_DECREF(code);
    Py_XDECREF(done);
    return done == NULL || flush("stdout") != 0 || flush("stderr") != 0 ? -1 : 0;
}

static PyObject *run(PyObject *self, PyObject *args) {
    const char *source;
    PyObject *file, *module;
    if (!PyArg_ParseTuple(args, "sUO!", &source, &file, &PyModule_Type, &module)) return NULL;
    if (run_source(source, file, module) != 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *source(PyObject *self, PyObject *args) {
    return PyUnicode_FromString(plain_source == NULL ? "" : plain_source);
}

static PyObject *receive(PyObject *self, PyObject *args) {
    child_start start;
    char *payload = NULL;
    bool has_peer = false;
    if (!child_receive(&start, &payload, &has_peer)) _exit(0); /* the server is gone, or never needed this child */
    size_t length = start.payload_bytes, taken = take_secret(payload, length);
    if (payload[0] != PLAIN || memchr(payload, 0, length) != NULL)
        return Py_BuildValue("(y#i)", payload + taken, (Py_ssize_t)(length - taken), has_peer ? PEER_FD : -1);
    payload[length] = 0;
    plain_source = payload + 1;
    if (run_source(plain_source, script.file, script.module) != 0) return NULL;
    if (ending_due() && PyObject_CallNoArgs(script.end) == NULL) return NULL;
    _exit(write(CHANNEL_FD, script.result.buf, (size_t)script.result.len) == script.result.len ? 0 : 1);
}

static PyObject *keep(PyObject *self, PyObject *args) {
    if (owner != NULL) return PyErr_Format(PyExc_PermissionError, "not now");
    owner = PyEval_GetFrame();
    Py_XINCREF((PyObject *)owner);
    Py_RETURN_NONE;
}

static PyObject *verdict(PyObject *self, PyObject *args) {
    const char *bytes;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "y#", &bytes, &count)) return NULL;
    if (owner == NULL || owner != (void *)PyEval_GetFrame() || count > MAX_CHILD_FRAME - (Py_ssize_t)sizeof secret)
        return PyErr_Format(PyExc_PermissionError, "not yours");
    child_header header = {.length = (uint32_t)((size_t)count + sizeof secret), .kind = CHILD_RESULT};
    struct iovec parts[3] = {{&header, sizeof header}, {(void *)bytes, (size_t)count}, {secret, sizeof secret}};
    if (writev(CHANNEL_FD, parts, 3) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    memset(secret, 0, sizeof secret);
    Py_RETURN_NONE;
}

static PyObject *seal(PyObject *self, PyObject *args) {
    image_seal();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"seal", seal, METH_NOARGS, "seal(): what is made from here on lies together, in pages that hold nothing else."},
    {"serve", serve, METH_VARARGS,
     "serve(host_fd, proc_fd, groups_fd or -1, armed, is_for_sessions, file, module, result, end, child): fork a jailed child for each job, "
     "which calls `child(receive)`. A plain script is run in `module`; where it leaves anything to end, `end` is called, "
     "and then `result` sent."},
    {"receive", receive, METH_NOARGS,
     "receive() -> (payload, peer_fd or -1): wait for a job, then confine this child. A plain script is run here: this "
     "raises what it raises, or ends the process."},
    {"run", run, METH_VARARGS, "run(source, file, module): execute a script and flush what it printed."},
    {"source", source, METH_NOARGS, "source() -> the plain script that receive() ran, or an empty string."},
    {"keep", keep, METH_NOARGS, "keep(): hold the verdict's secret for the calling frame."},
    {"verdict", verdict, METH_VARARGS, "verdict(body): send the result frame with the secret, from the frame of keep()."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_jail", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__jail(void) { return PyModule_Create(&module); }
