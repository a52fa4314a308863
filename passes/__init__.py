"""The compiler's passes: one file and one public function each, ``(program, ...) -> program``, in the order they run.

capture      the user's model -> a flat functional graph (with regions, autocast, batchnorm, grouped)
simplify     drop what computes nothing
outputs      only the loss, if the plan asks for that
precision    casts between storage and compute dtypes
masks, gqa   what attention is told by a mask or by repeated heads becomes a property of it (with bands, constants)
losses       cross-entropy and its relatives, spelled so that classes and tokens can be split
dropout      every dropout from the counter-based generator
infer        factors and roles of every value (with factors, rules/, roles)
axes         finer mesh axes where a model's heads call for them
place        the plan's preferences -> the layout of every operator and value
partition    the program of one rank (with layout, reshard, cost)
accumulate   the variant that leaves gradients unsummed over dp

What they share: rewrite (building nodes), factors, layout, rules/. The list of passes that a compilation runs is
`fxpar.compiler.passes`.
"""
