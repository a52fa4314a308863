"""html: a report as one page that needs nothing else: its drawings are SVG; its style (page.css) and what happens under the
pointer (page.js) stand in it.

page       the page, and what it says in words        mesh      the ranks, and what each axis splits
layers     parameters, as a table that folds          lanes     a forward and a backward on a clock
pipeline   the schedule of a pipeline's stages        memory    what a rank holds over a step, by kind
block      the graph of one block, with layouts       svg       how elements are written
"""
