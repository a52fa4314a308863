"""What is known of a user's model and of its calls, before anything is traced.

inputs        a call's leaves and their signature; example inputs, global batches
containers    dataclasses and mappings that hold a call's tensors
reads         which attributes a forward looked at, and whether they are as they were
state         what the programs of a model depend on besides inputs, as a key
identity      DTensors that take the place of the model's own parameters, wherever those are held
padding       batches made longer, so that calls are of few shapes
hugging_face  example inputs and settings that Hugging Face models say of themselves
"""
