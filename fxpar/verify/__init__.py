"""A plan against one device, in one process.

simulation   `fxpar.simulate`: every rank of a plan, in lock step
step         one step of it
equivalence  `fxpar.testing.assert_equivalent`: a simulated run against the plain model
"""
