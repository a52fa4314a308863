"""Who moves what between ranks.

base     `Transport`: NCCL alone, or copy engines for parameters and gradients
runtime  process groups for a program's collectives
control  the side channel on which ranks agree
watch    signs of life: nobody waits for ever
copies   collectives by copy engines, between GPUs that see each other's memory
threads  process groups whose ranks are threads of one process
"""
