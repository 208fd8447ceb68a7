# How greenlets.py is compiled.
cimport cython

from gtcpserver.c.greenlet_api cimport greenlet, has_attributes, import_greenlet, switch_to, switch_with
from gtcpserver.pool.places cimport Places

cdef extern from "Python.h":
    Py_ssize_t getrefcount "Py_REFCNT" (object)


cdef class Runner:
    cdef set _dying, _greenlets
    cdef Places _places
    cdef Py_ssize_t _references
    cdef public Py_ssize_t keep
    cdef public list waiting
    cdef public object empty, retire_timer

    @cython.locals(waiting=list, greenlets=set, greenlet=HandlerGreenlet)
    cpdef run_one(self, function, argument)
    cdef Py_ssize_t _count_references(self) except -1
    @cython.locals(greenlets=set, places=Places)
    cdef finished(self, HandlerGreenlet greenlet)
    cdef lost(self, HandlerGreenlet greenlet)
    cpdef wait_for_work(self, HandlerGreenlet greenlet)
    cpdef retire(self, Py_ssize_t count)


cdef class HandlerGreenlet(greenlet):
    cdef public object links, loop
    cdef public bint ends_process, working
    cdef public long long runs, seen
    cdef Runner _runner

    @cython.locals(runner=Runner)
    cpdef run(self)


@cython.locals(runner=Runner, waiting=list, references=Py_ssize_t)
cdef Py_ssize_t references_of_a_waiting_one() except -1
cdef object _wait_for_a_job(hub)
cdef object _report(hub, HandlerGreenlet context)
