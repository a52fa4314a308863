"""What `parallelize` returns, and what it does when it is called.

module        `ParallelModule`, which training loops hold
programs      how many programs are kept of one model
feed          the local inputs of a program, call by call
microbatches  a training step of several forwards and backwards that add up to the whole batch's
accumulation  gradients and gathered parameters between the microbatches of a step
agreement     what ranks exchange, so that they all run or all raise
storage       full tensors <-> DTensors in a program's layouts
initialize    parameters of meta models, as the model itself initialises them
edges         tensors that go from one parallel module into another
numbers       Python numbers in a call that need no capture of their own
clip          the norm of all gradients over all ranks
"""
