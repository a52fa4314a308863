"""Which logical dimension every dim of every value is.

infer  the pass: factors by the operators' rules (rules/), roles by what they do in the model (roles)
"""
