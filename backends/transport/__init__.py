"""Who moves what between ranks.

base     `Transport`: NCCL alone, or copy engines for parameters and gradients
runtime  process groups for a program's collectives, and the side channel on which ranks agree
copies   collectives by copy engines, between GPUs that see each other's memory
threads  process groups whose ranks are threads of one process
"""
