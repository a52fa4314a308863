"""The user's model -> a flat functional graph.

capture     the pass; (with the following)
traced      what is changed around tracing, and put back
functions   custom autograd functions and tensor hooks
attributes  attributes that the forward writes
regions     parts of the model under other settings than the rest
autocast    casts that autocast asked for
batchnorm   batch norms and the buffers they move
grouped     experts' products of grouped rows
layers      of equal layers one is traced (with evidence: the proof that they are)
"""
