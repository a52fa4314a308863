"""What one strategy adds to the placements or to the partitioned program.

zero          parameters stored in parts over data-parallel and context ranks
context       the lengths that context parallelism can split
microbatches  the program of one microbatch, such that a step of them is that of the whole batch
linear        what each value is to the microbatches of a step
prologue      what is computed before a step for all of its microbatches
replicas      sums over replicas that become averages
stages        the partitioned program cut into the programs of pipeline stages
"""
