"""The phases of a round, each a function of the stages and the run directory; `loop.py` puts them in order."""
