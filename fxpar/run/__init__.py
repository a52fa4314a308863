"""What `parallelize` returns, and what it does when it is called.

module      `ParallelModule`, which training loops hold: a store and an engine
store       a model's parameters in the layouts of a plan (with storage: full tensors <-> DTensors)
engine      captures, compiles and runs programs, one for every kind of call (with programs: how many are kept)
start       the first run of a program: timed, and said
feed        the local inputs of a program, call by call
recording   forward and backward recorded and played back by the GPU (with pool: what they lend; votes: of ranks)
recorded_step  the same of whole steps of a pipeline (with step_feed: what they take; own_memory: gradients that are scaled in it)
pipeline    whole steps of a rank of a pipeline (with stage: one stage of it; post: messages between ranks)
steps       which of a step's phases runs when: unshard, compute, reduce (with gradients: those not reduced yet)
microbatches  a training step of several forwards and backwards that add up to the whole batch's
agreement   what ranks exchange, so that they all run or all raise
batches     whether the ranks of a replica were given the same values
drift       whether what ranks hold alike has stayed alike (with arriving: numbers that come from a GPU)
replica     a sampler that gives them the same
updates     what optimizers did, for ranks to compare
initialize  parameters of meta models, as the model itself initialises them
edges       tensors that go from one parallel module into another
outputs     tensors that tp splits meet plain ones
draws       what is drawn at random for tensors of which ranks hold parts, and written to these
alone       parts of the model that are called by themselves
sums        numbers read from sums over parameters
gathered    the plain model, for a while (with whole: who asks for it)
optimizers  those that cannot step parts of parameters
numbers     Python numbers in a call that need no capture of their own
clip        the norm of all gradients over all ranks
meter       seconds, throughput, MFU and memory of steps
"""
