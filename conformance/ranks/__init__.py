"""The code of a rank process: the loop that serves the controller, and a module per framework.

Ranks run cases and answer with arrays and facts. They never judge.
"""
