"""Kernels of vtengine: each op is one function with `impl=`, a plain reference, and faster implementations.

`vtengine_kernels.dispatch.report()` says what is available here and, where something is not, why and what it costs.
"""
