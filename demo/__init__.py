"""The making of the trained demo: a procedural world, the models that learn from it (assets/), and the score of an adapter.

`--demo` needs nothing of this at run time but the files in assets/; without them it makes those of common/model/tiny.py.
"""
