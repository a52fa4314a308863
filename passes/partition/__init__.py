"""The program of one rank.

partition   local operators, and collectives between their layouts
reshard     the collectives from one layout to another
accumulate  the graphs of gradient accumulation
"""
