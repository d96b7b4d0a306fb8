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

static PyObject *serve(PyObject *self, PyObject *args) {
    int host, proc;
    unsigned int armed;
    if (!PyArg_ParseTuple(args, "iiI", &host, &proc, &armed)) return NULL;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    image_seal();
    image_pack(proc);
    uint32_t base_mb = address_space_mb(proc); /* before the arena, which children do not inherit */
    arena_open();
    if (!jail_without("seccomp") && seccomp_begin() != 0) return PyErr_SetFromErrno(PyExc_OSError);
    server *s = arena_alloc(sizeof *s);
    s->host = host;
    s->proc = proc;
    s->uid = getuid();
    s->gid = getgid();
    s->armed_target = armed < MAX_ARMED ? armed : MAX_ARMED;
    s->base_mb = base_mb;
    server_run(s);
    /* One thread before and after, no lock held, the same thread block: CPython needs no repair after this fork, and each
     * page it would touch is a page to copy. */
    Py_RETURN_NONE;
}

static PyObject *receive(PyObject *self, PyObject *args) {
    child_start start;
    char *payload = NULL;
    bool has_peer = false;
    if (!child_receive(&start, &payload, &has_peer)) _exit(0); /* the server is gone, or never needed this child */
    PyObject *result = Py_BuildValue("(y#i)", payload, (Py_ssize_t)start.payload_bytes, has_peer ? PEER_FD : -1);
    free(payload);
    return result;
}

/* The secret of a same-process verdict, and the frame that may use it: neither is a Python object that a job could find. */
static char secret[32];
static void *owner;

static PyObject *keep(PyObject *self, PyObject *args) {
    const char *bytes;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "y#", &bytes, &count)) return NULL;
    if (owner != NULL || count != sizeof secret) return PyErr_Format(PyExc_PermissionError, "not now");
    memcpy(secret, bytes, sizeof secret);
    memset((char *)bytes, 0, (size_t)count); /* the caller's copy; nothing else refers to it */
    owner = PyEval_GetFrame();
    Py_INCREF((PyObject *)owner);
    Py_RETURN_NONE;
}

static PyObject *verdict(PyObject *self, PyObject *args) {
    const char *bytes;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "y#", &bytes, &count)) return NULL;
    if (owner == NULL || owner != (void *)PyEval_GetFrame() || count > MAX_FRAME - (Py_ssize_t)sizeof secret)
        return PyErr_Format(PyExc_PermissionError, "not yours");
    child_header header = {.length = (uint32_t)((size_t)count + sizeof secret), .kind = CHILD_RESULT};
    struct iovec parts[3] = {{&header, sizeof header}, {(void *)bytes, (size_t)count}, {secret, sizeof secret}};
    if (writev(CHANNEL_FD, parts, 3) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    memset(secret, 0, sizeof secret);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"serve", serve, METH_VARARGS,
     "serve(host_fd, proc_fd, armed): fork a jailed child for each job; returns None, in a child only."},
    {"receive", receive, METH_NOARGS, "receive() -> (payload, peer_fd or -1): wait for a job, then confine this child."},
    {"keep", keep, METH_VARARGS, "keep(secret): hold the 32 bytes of the verdict's secret for the calling frame."},
    {"verdict", verdict, METH_VARARGS, "verdict(body): send the result frame with the secret, from the frame of keep()."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_jail", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__jail(void) { return PyModule_Create(&module); }
