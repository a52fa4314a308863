"""One spelling for what models write in many ways.

simplify   what computes nothing is dropped
outputs    only the loss is kept, if the plan asks for that
precision  casts between the dtypes that parameters are stored and computed in
masks      attention masks -> properties of the attention operator (with bands, constants)
sights     what masks of padded and packed batches are made of
gqa        repeated key and value heads -> grouped-query attention
shift      the last token has a label that is ignored, where a model leaves it out
losses     cross-entropy and its relatives, so that classes and tokens can be split
experts    rows sorted by their experts -> operators that work on any part of the tokens (with counted)
dropout    every dropout from the counter-based generator
random     every other random operator, too
"""
