"""The compiler's passes: one file and one public function each, ``(program, ...) -> program``. pipeline is the list.

capture/     the user's model -> a flat functional graph
canonical/   one spelling for what models write in many ways
infer/       which logical dimension every dim of every value is, by rules for operators
place/       the plan's preferences -> the layout of every operator and value
strategies/  what one strategy adds
partition/   the program of one rank

What they share: rewrite (building nodes) and `fxpar.sharding`.
"""
