"""What runs in a rank process: the loop that serves the controller, and one module a framework.

Ranks run what they are told and answer with arrays and facts. They never judge.
"""
