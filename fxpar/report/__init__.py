"""What a plan does to a model, for people to read.

report  `fxpar.inspect`: layouts of parameters, collectives, memory, FLOPs
memory  the predicted peak of one rank
dump    programs as readable and runnable Python
"""
