"""The program of one rank.

partition   local operators, and collectives between their layouts
reshard     the collectives from one layout to another
phases      the graphs of a step: unshard, compute, reduce
"""
