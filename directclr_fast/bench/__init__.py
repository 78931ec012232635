"""Everything that times: ``directclr-fast bench``, and the studies.

The command is command, what it measures settings; grid runs the cases over the variants of
variants; ceilings measures what the machine can do; report prints and draws a result, regressions
compares two. Studies are memory, trainer, stages, processes, gradcache, adapters and tune, in the
frame of study. timing times for all of them.
"""
