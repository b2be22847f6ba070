"""One run on several processes: rank 0 runs the rounds and is the run directory's only writer, the others work for it.

Guarantee: importing this package imports no torch; with one process nothing of it is used.
"""
