# Slots of Python classes (``__slots__``), read and written by their offset: 8 instructions in place of 150.

cdef extern from *:
    """
    #include <structmember.h>

    static Py_ssize_t gtcpserver_offset(PyObject *descriptor) {
        PyMemberDef *member;
        if (!Py_IS_TYPE(descriptor, &PyMemberDescr_Type)) return -1;
        member = ((PyMemberDescrObject *)descriptor)->d_member;
        return member->type == T_OBJECT_EX && member->flags == 0 ? member->offset : -1;
    }
    static inline void gtcpserver_put(PyObject *owner, Py_ssize_t offset, PyObject *value) {
        PyObject **slot = (PyObject **)((char *)owner + offset), *before = *slot;
        Py_INCREF(value);
        *slot = value;
        Py_XDECREF(before);
    }
    static inline PyObject *gtcpserver_get(PyObject *owner, Py_ssize_t offset) {
        PyObject *value = *(PyObject **)((char *)owner + offset);
        if (value == NULL) value = Py_None;
        Py_INCREF(value);
        return value;
    }
    static inline PyObject *gtcpserver_instance(PyObject *type) {
        return ((PyTypeObject *)type)->tp_alloc((PyTypeObject *)type, 0);
    }
    """
    object instance_of "gtcpserver_instance"(object type)  # as object.__new__
    Py_ssize_t gtcpserver_offset(object descriptor)
    void put "gtcpserver_put"(object owner, Py_ssize_t offset, object value)
    object get "gtcpserver_get"(object owner, Py_ssize_t offset)  # None: not set


cdef inline Py_ssize_t offset_of(descriptor) except -1:
    """Return the offset of a slot in the objects of its class, and of its subclasses."""
    cdef Py_ssize_t offset = gtcpserver_offset(descriptor)
    if offset < 0:
        raise TypeError(f"expected a slot, got {descriptor!r}")
    return offset
