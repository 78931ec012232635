"""Benchmarks of the loss beside its peers: ``directclr-fast bench``, and the helpers of bench/.

timing times, machine and ceilings say on what, variants says who, memory measures peaks, grid runs
the cases, report prints and draws them, against compares two result files.
"""
