"""How values are spread over ranks: what passes, storage and checkpoints share.

mesh       named axes of ranks; which axes a strategy consists of
factors    the logical dimensions that a tensor's dims are made of
layout     which mesh axis splits which factor, and the pieces that follow for a rank (shardings)
facts      what passes know of a value, global or local, kept on the node that makes it
placement  what the passes decide of each operator, beside the graph
chunks     the parts of a tensor that ranks hold, and who owns each
"""
