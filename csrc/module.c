/* fastgrpo_sandbox._jail: serve() forks jobs and returns only in a child; receive() waits there for the job. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "jail.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
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
    uint32_t base_mb = address_space_mb(proc); /* before the arena, which children do not inherit */
    arena_open();
    server *s = arena_alloc(sizeof *s);
    s->host = host;
    s->proc = proc;
    s->uid = getuid();
    s->gid = getgid();
    s->armed_target = armed < MAX_ARMED ? armed : MAX_ARMED;
    s->base_mb = base_mb;
    server_run(s);
    PyOS_AfterFork_Child();
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

static PyMethodDef methods[] = {
    {"serve", serve, METH_VARARGS,
     "serve(host_fd, proc_fd, armed): fork a jailed child for each job; returns None, in a child only."},
    {"receive", receive, METH_NOARGS, "receive() -> (payload, peer_fd or -1): wait for a job, then confine this child."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_jail", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__jail(void) { return PyModule_Create(&module); }
