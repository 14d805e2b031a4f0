"""A fuzzer: draws programs that call attention, runs them, and compares with a formula in NumPy that shares no code."""
