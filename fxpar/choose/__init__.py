"""Which plan: `fxpar.suggest` searches plans by the cost model of fxpar/cost, and says why it prefers one.

facts      what the formulas have to know of a model, read off its program on one device
space      all plans for a number of GPUs, and what the formulas say of them
evaluate   plans partitioned for real: step, terms and peak as `fxpar.inspect` has them
reasons    what limits a plan, and why others are rejected, in a sentence each
suggest    the search, and what it returns
"""
