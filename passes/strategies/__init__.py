"""What one strategy adds to the placements or to the partitioned program.

zero      parameters stored in parts over data-parallel ranks
replicas  sums over replicas that become averages
stages    the partitioned program cut into the programs of pipeline stages
"""
