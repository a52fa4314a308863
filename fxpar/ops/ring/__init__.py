"""ring: attention whose sequence is split over ranks, as one operator (operator.py).

schedule.py says which rank needs which keys when, algorithm.py does it as generators that ask for transfers, drive.py gives them
transfers, packets.py is what travels; sight.py says which keys a query sees, blocks.py and kernels.py compute one pair of blocks;
costs.py counts bytes and floating-point operations. chunks.py is attention to keys that are there, of the same blocks.
"""
