"""What a plan does to a model, for people to read.

report  `fxpar.inspect`: layouts of parameters, collectives, memory, FLOPs
memory  the predicted peak of one rank
brief   its graphs, of which a few of many equal blocks are traced
kept    proof that those keep for the backward pass what all would
dump    programs as readable and runnable Python
"""
