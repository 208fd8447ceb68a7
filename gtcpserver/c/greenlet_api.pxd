# greenlet's public C API (greenlet.h): what compiled modules call in place of getcurrent() and greenlet.switch().

cdef extern from "greenlet/greenlet.h":
    ctypedef class greenlet.greenlet [object PyGreenlet, check_size error]:
        pass

    # Once in each compiled module that uses one of the others; without it they crash.
    void PyGreenlet_Import()
    greenlet PyGreenlet_GetCurrent()
    object PyGreenlet_Switch(greenlet target, void* args, void* kwargs)

cdef extern from *:
    """
    /* Reading __dict__ of a greenlet makes one. */
    static inline int gtcpserver_has_attributes(PyObject *greenlet) {
        PyObject **dict = _PyObject_GetDictPtr(greenlet);
        return dict != NULL && *dict != NULL && PyDict_GET_SIZE(*dict) != 0;
    }
    """
    void* _PyGreenlet_API
    bint has_attributes "gtcpserver_has_attributes"(object greenlet)


cdef inline int import_greenlet() except -1:
    PyGreenlet_Import()
    if _PyGreenlet_API is NULL:
        raise ImportError("greenlet has no C API")
    return 0


cdef inline greenlet getcurrent():
    return PyGreenlet_GetCurrent()


cdef inline object switch_to(object target):
    """Switch to a greenlet without arguments. The caller knows that it is one."""
    return PyGreenlet_Switch(<greenlet>target, NULL, NULL)


cdef inline object switch_with(object target, object first, object second):
    cdef tuple args = (first, second)
    return PyGreenlet_Switch(<greenlet>target, <void*>args, NULL)
