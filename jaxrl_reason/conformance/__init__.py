"""The conformance suite: every loss against a float64 NumPy oracle, and against its own laws.

`pytest --pyargs jaxrl_reason.conformance` checks this package, and with `--impl my_module` the
functions that a module of yours offers under the same names.
"""
