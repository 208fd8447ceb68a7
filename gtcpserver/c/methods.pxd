# Bound methods.

cdef extern from "Python.h":
    object bound "PyMethod_New"(object function, object owner)
