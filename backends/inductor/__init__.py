"""AOTAutograd and Inductor on the partitioned program.

lower     the backend: settings, and the list of graph passes
key       by what compiled graphs are found again, by the next process too
lowered   the same graphs, run by every rank of a simulation
reductions, fp32_products, products, overlap, prefetch, buckets   the graph passes, in the order they run
casts     operators that they use
named     what profiles of compiled code call its operators
sites     which dropout one is, as an input of its graph, so that layers with dropout are equal
brief, kept, whole, few    of many equal blocks a few are traced
pieces    equal blocks cut out of graphs, each to be compiled once
liveness  the memory that such graphs need
"""
