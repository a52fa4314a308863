"""The plan's preferences -> the layout of every operator and value.

axes   finer mesh axes where a model's heads call for them
place  the layouts
"""
