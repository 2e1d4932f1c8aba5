"""``distill`` as a command does it: a recipe, data and a directory in; trained students and a report out.

``images``: a teacher and a chain of vision Mambas. ``language``: a smaller or quantized student of a language model.
"""
