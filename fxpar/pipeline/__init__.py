"""Pipeline schedules as data: which rank computes and sends what, in which order, and how long a step takes.

schedules  the order of every rank's actions for each schedule, with sends and receives
check      the proof, on one table, that it computes everything once, in a possible order, and cannot hang
timeline   from times per stage: when every action runs, the step's time, the bubble
drawing    a timeline as text and as SVG
execute    runs a rank's list of actions, on stages and messages that others bring
"""
