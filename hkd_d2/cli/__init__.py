"""The command line ``hkd``, one file a command.

A command's module has its help text as docstring, ``add_arguments(parser)`` and ``run(args)``,
which returns the exit code. What takes long to import is imported in ``run``, so that help and
completion answer at once and ``hkd score`` needs NumPy alone.
"""
