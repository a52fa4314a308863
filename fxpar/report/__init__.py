"""What a plan does to a model, for people to read.

report    `fxpar.inspect`: layouts of parameters, collectives, memory, FLOPs (with data: as dicts; words: layouts, for people)
terminal  its tables in colours
html      it as one page, with drawings
pipeline  what it says of a pipeline: stages, cuts, what each rank holds, the timeline
step      what a step takes on a cluster
traffic   what a step communicates, and totals of it (with attention, experts: what theirs does)
verdict   whether a plan fits into a memory, and what would
memory    the predicted peak of one rank, or of each rank of a pipeline
alike     stages of a pipeline of which one is traced for all
brief     its graphs, of which a few of many equal blocks are traced
kept      proof that those keep for the backward pass what all would
timings   where the time went on the way to the first step
text      tables
dump      programs as readable and runnable Python (with blocks: equal ones, of which one is written)
"""
