"""A plan against one device, in one process.

simulation   `fxpar.simulate`: every rank of a plan, in lock step
equivalence  `fxpar.testing.assert_equivalent`: a simulated run against the plain model
"""
