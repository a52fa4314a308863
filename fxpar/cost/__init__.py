"""What a step costs on given machines.

clusters  machines that models are trained on: `clusters/*.toml`, and their reader
"""
