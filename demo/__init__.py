"""The making of the trained demo in assets/: a procedural world, models that learn from it, the score of an adapter.

`--demo` needs nothing else of this at run time; without assets/ it makes the model of common/model/tiny.py.
"""
